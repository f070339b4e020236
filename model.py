"""Load a vision-language model, pack groups of completions, and compute their log-probabilities.

    policy, processor = load_policy("Qwen/Qwen2.5-VL-3B-Instruct")      or a folder, or random:tiny | demo | 3b | 7b
    for packed in pack(prompts, groups, policy.config, advantages=advantages, token_budget=16384):
        logp, entropy = policy(packed.to(device), temperature=1.0)      # (M,) one number a completion token

Packed groups are the only layout: a group is its prompt once, then its G completions, each continuing the prompt's
positions and attending to the prompt and to itself (kernels/prefix_attention.py). The vision tower runs once a picture.
"""

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels import prefix_attention
from kernels.linear_policy_loss import linear_policy_loss
from kernels.logprob import token_logprob
from kernels.policy_loss import policy_loss

DEMO_PROCESSOR = Path(__file__).parent / "assets" / "demo-model"

# What differs between model families; another family is another entry.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
FAMILIES = {
    "qwen2_5_vl": dict(
        model_class="Qwen2_5_VLForConditionalGeneration",
        never_sampled=VISION_TOKENS,
        mask_by_layer_type=True,  # its language model takes a dict of masks
        liger="apply_liger_kernel_to_qwen2_5_vl",
    ),
    "qwen3_vl": dict(
        model_class="Qwen3VLForConditionalGeneration",
        never_sampled=VISION_TOKENS,
        mask_by_layer_type=False,
        liger="apply_liger_kernel_to_qwen3_vl",
    ),
}

# random:NAME. `3b` and `7b` are the published shapes of Qwen2.5-VL; `demo` is what the shipped model has: rope with a
# small base and full vision attention, because its pictures are a few patches wide; `tiny` is for
# tests (heads of 32: vLLM has no smaller on the CPU).
SHAPES = {
    "tiny": dict(
        text=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=128, mrope_section=[4, 6, 6]),
        vision=dict(depth=2, hidden_size=64, num_heads=2, intermediate_size=64, fullatt_block_indexes=[1]),
        vocab_size=None, tied=True,
    ),
    "demo": dict(
        text=dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3,
                  intermediate_size=512, mrope_section=[4, 14, 14], rope_theta=10.0),
        vision=dict(depth=4, hidden_size=128, num_heads=2, intermediate_size=384, window_size=448,
                    fullatt_block_indexes=[0, 1, 2, 3]),
        vocab_size=None, tied=True,
    ),
    "3b": dict(
        text=dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                  intermediate_size=11008, mrope_section=[16, 24, 24]),
        vision=dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420,
                    fullatt_block_indexes=[7, 15, 23, 31]),
        vocab_size=151936, tied=True,
    ),
    "7b": dict(
        text=dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                  intermediate_size=18944, mrope_section=[16, 24, 24]),
        vision=dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420,
                    fullatt_block_indexes=[7, 15, 23, 31]),
        vocab_size=152064, tied=False,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- loading


def load_processor(source: str | Path):
    """Tokenizer, chat template and picture processor of a checkpoint, from a folder or a hub id."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no processor there ({str(error).splitlines()[0]}); give --processor PATH") from error


def compute_dtype(name: str, device_type: str) -> torch.dtype:
    """auto is bfloat16 on a GPU and float32 otherwise; any other name is torch's."""
    return getattr(torch, name if name != "auto" else "bfloat16" if device_type == "cuda" else "float32")


def random_config(shape: str, processor):
    """The transformers configuration of a named shape (SHAPES), token ids from the processor."""
    from transformers import Qwen2_5_VLConfig

    if shape not in SHAPES:
        raise ValueError(f"random:{shape}: unknown shape, one of {', '.join('random:' + name for name in SHAPES)}")
    spec, tokenizer = copy.deepcopy(SHAPES[shape]), processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "endoftext", "im_end")}  # fmt: skip
    text = spec["text"]
    rope = dict(rope_type="default", rope_theta=text.pop("rope_theta", 1e6), mrope_section=text.pop("mrope_section"))
    vocab = spec["vocab_size"] or -(-len(tokenizer) // 64) * 64
    if vocab < len(tokenizer):
        raise ValueError(f"random:{shape} has {vocab} vocabulary rows, the tokenizer {len(tokenizer)} tokens")
    return Qwen2_5_VLConfig(
        text_config=dict(**text, vocab_size=vocab, rope_parameters=rope, max_position_embeddings=32768, rms_norm_eps=1e-6,
                         bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"],
                         tie_word_embeddings=spec["tied"]),
        vision_config=dict(**spec["vision"], out_hidden_size=text["hidden_size"], tokens_per_second=2),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=spec["tied"],
    )  # fmt: skip


def load_model(source: str, *, processor: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0,
               device: str = "cpu", kernels: bool = True):  # fmt: skip
    """A checkpoint (folder or hub id) or random weights (`random:SHAPE`) -> (transformers model, processor).

    kernels=False leaves its layers in plain torch, on a GPU too.

    Raises ValueError, one line, when the source is not there or is no vision model of a known family."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    attention = prefix_attention.register()
    if source.startswith("random:"):
        proc = load_processor(processor or DEMO_PROCESSOR)
        config = random_config(source.removeprefix("random:"), proc)
        torch.manual_seed(seed)
        with torch.device(device):
            model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            cure = "give a checkpoint folder, a hub id, or random:tiny"
            raise ValueError(f"{source}: no model there ({str(error).splitlines()[0]}); {cure}") from error
        if config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"{source}: a {config.model_type} checkpoint, not a vision model this code knows ({known})")
        model_class = getattr(transformers, FAMILIES[config.model_type]["model_class"])
        try:
            model, loaded = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
            model = model.to(device)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{source}: the weights do not load: {str(error).splitlines()[0]}") from error
        if missing := sorted(loaded["missing_keys"]):  # transformers fills them with noise and only prints a table
            raise ValueError(f"{source}: {len(missing)} weights are missing from the checkpoint, {missing[0]} the first")
        proc = load_processor(processor or source)
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._attn_implementation = attention
    patch_embed_as_product(model.model.visual.patch_embed)
    if kernels and torch.device(device).type == "cuda":
        use_liger(model)
        for block in model.model.visual.blocks:
            if hasattr(block.mlp, "gate_proj"):
                align_mlp(block.mlp)
    return model, proc


def patch_embed_as_product(embed: nn.Module) -> None:
    """The stride of this convolution is its kernel, so it is a matrix product, and many times faster as one."""

    def forward(self, pixels: Tensor) -> Tensor:  # (patches, C*t*p*p) -> (patches, width)
        return F.linear(pixels.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)

    embed.forward = MethodType(forward, embed)  # bound, so that a copy of the module gets a copy of the method


def align_mlp(mlp: nn.Module, multiple: int = 8) -> None:
    """The vision tower's 3,420 columns are no multiple of 8, and cuBLAS has no fast kernel for such rows: the products are
    done with zero columns added, gate and up in one. A zero column stays zero behind the activation, and nothing reads it."""
    extra = -mlp.gate_proj.out_features % multiple
    if not extra:
        return

    def forward(self, x: Tensor) -> Tensor:  # (patches, width) -> (patches, width)
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        rows = gate.weight.new_zeros(extra, gate.in_features)
        weight = torch.cat([gate.weight, rows, up.weight, rows])
        bias = torch.cat([gate.bias, rows[:, 0], up.bias, rows[:, 0]])
        gated, upper = F.linear(x, weight, bias).chunk(2, dim=-1)  # (patches, columns + extra) each
        return F.linear(self.act_fn(gated) * upper, F.pad(down.weight, (0, extra)), down.bias)

    mlp.forward = MethodType(forward, mlp)


def use_liger(model) -> None:
    """Liger's RMSNorm, SwiGLU and rope in this model. Its fused cross-entropy stays off: the head is ours (kernels/)."""
    try:
        from liger_kernel import transformers as liger
    except ImportError:
        print("liger-kernel is not installed: norms, SwiGLU and rope run in plain torch (pip install liger-kernel)")
        return
    modeling = sys.modules[type(model).__module__]
    getattr(liger, FAMILIES[model.config.model_type]["liger"])(model=model, rope=False, fused_linear_cross_entropy=False)
    # Liger patches a function of transformers 4; now the layers call this one, with mrope's sections merged already.
    if modeling.apply_rotary_pos_emb.__module__ != modeling.__name__:
        return  # done for another model
    plain, plain_vision = modeling.apply_rotary_pos_emb, modeling.apply_rotary_pos_emb_vision

    def vision_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """q and k (patches, heads, d), cos and sin (patches, d). Liger's own for vision casts to fp32 and back around its
        kernel, which computes in cos' precision anyway."""
        if not q.is_cuda:
            return plain_vision(q, k, cos, sin)
        turned = liger.liger_rotary_pos_emb(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k)), cos.float(), sin.float())
        return tuple(x.squeeze(0).transpose(0, 1) for x in turned)

    modeling.apply_rotary_pos_emb = lambda q, *rest: (liger.liger_rotary_pos_emb if q.is_cuda else plain)(q, *rest)
    modeling.apply_rotary_pos_emb_vision = vision_rope


def banned_ids(processor, model, extra: tuple[int, ...] = ()) -> Tensor:
    """(V,) bool: ids that are never sampled and carry no probability: the family's vision specials, vocabulary rows
    beyond the tokenizer, and `extra`. Engine and trainer both use this one mask."""
    vocab = model.config.text_config.vocab_size
    banned = torch.zeros(vocab, dtype=torch.bool)
    banned[len(processor.tokenizer) :] = True
    specials = processor.tokenizer.convert_tokens_to_ids(list(FAMILIES[model.config.model_type]["never_sampled"]))
    banned[[i for i in (*specials, *extra) if i is not None]] = True
    return banned


def stop_ids(processor) -> tuple[int, ...]:
    """The ids that end a completion: end of turn, end of text."""
    tokenizer = processor.tokenizer
    return tuple(sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")} - {None}))


# ---------------------------------------------------------------- positions and packing


def shown_ids(config) -> tuple[int, int]:
    """The placeholders of pictures and of clips."""
    return config.image_token_id, config.video_token_id


def check_clips(config) -> None:
    if not hasattr(config.vision_config, "tokens_per_second"):  # Qwen3-VL writes times into its prompt instead
        raise ValueError(f"{config.model_type}: clips are shown to Qwen2.5-VL only; give rows of pictures, or another --model")


def mrope_positions(ids: list[int], grid: Tensor | None, config, seconds: float | None = None) -> Tensor:
    """Temporal, height and width position of every prompt token: expanded ids (P,), grid (pictures, 3) -> (3, P).

    Text counts up on all three rows; a picture of h x w merged patches keeps time still, spreads rows and columns, and
    moves the count on by max(h, w). Computed once for both sides: in transformers 5 a missing token-type row silently
    gives 1-D positions."""
    if seconds is not None:
        check_clips(config)
    merge = config.vision_config.spatial_merge_size
    sizes = iter([] if grid is None else grid.tolist())
    parts, count, i = [], 0, 0
    shown = shown_ids(config)
    while i < len(ids):
        if ids[i] in shown:
            t, h, w = next(sizes)
            h, w = h // merge, w // merge
            time = torch.arange(t)
            if seconds is not None:  # of a clip: how far its steps of t lie apart, as vLLM counts them (docs/video.md)
                time = (time * (seconds * config.vision_config.tokens_per_second)).long()
            axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack(axes).reshape(3, -1) + count)  # (3, t*h*w)
            i, count = i + t * h * w, int(parts[-1].max()) + 1
        else:
            start = i
            while i < len(ids) and ids[i] not in shown:
                i += 1
            parts.append(torch.arange(count, count + i - start).expand(3, -1))
            count += i - start
    assert next(sizes, None) is None, "more pictures than placeholders"
    return torch.cat(parts, dim=1)


@dataclass
class Packed:
    """One micro-batch of whole groups. T packed tokens, M completion tokens, S completions.

    All prompts come first, then all completions. For one prompt `a b` with completions `c d` and `e`:
        ids [a b c d e]   positions [0 1 2 3 2]   rows [1 2 1]   targets [c d e]   sequence [0 0 1]
    Row r of the hidden states predicts its target; the prompt's last row predicts every completion's first token."""

    ids: Tensor  # (T,)
    positions: Tensor  # (3, T)
    layout: prefix_attention.Layout
    pixels: Tensor | None  # (patches, channels * time * patch * patch)
    grid: Tensor | None  # (pictures, 3), always on the CPU
    picture_rows: Tensor  # (picture tokens,) where their features go
    rows: Tensor  # (M,)
    targets: Tensor  # (M,)
    sequence: Tensor  # (M,) which completion, 0..S-1
    lengths: Tensor  # (S,) tokens of each completion
    advantages: Tensor  # (M,)
    rollout_logp: Tensor  # (M,) the engine's
    loss_mask: Tensor  # (M,) 1.0 where the token counts
    index: list[int]  # which group of the batch each packed group is
    old_logp: Tensor | None = None  # (M,) the trainer's, before the first optimiser step of this rollout
    ref_logp: Tensor | None = None  # (M,)
    features: Tensor | None = None  # (picture tokens, H or more) of a frozen tower, computed once a rollout

    def to(self, device) -> "Packed":
        """A copy there; to a GPU through pinned memory, or every copy would wait for what the GPU is doing."""
        device, moved = torch.device(device), {f.name: getattr(self, f.name) for f in fields(self)}
        for name, x in moved.items():
            if isinstance(x, Tensor) and name != "grid":
                moved[name] = (x.pin_memory() if device.type == "cuda" and not x.is_cuda else x).to(device, non_blocking=True)
        return Packed(**moved | dict(layout=prefix_attention.Layout(self.layout.groups, device)))


def group_tokens(prompt, group) -> int:
    return len(prompt.expanded) + sum(len(c.token_ids) for c in group)


def plan_packs(sizes: list[int], token_budget: int) -> list[list[int]]:
    """Indices of groups, packed first-fit by decreasing size; a group larger than the budget gets a pack alone."""
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((p for p, left in enumerate(room) if left >= sizes[i]), None)
        if place is None:
            packs.append([])
            room.append(token_budget)
            place = len(packs) - 1
        packs[place].append(i)
        room[place] -= sizes[i]
    return packs


def pack_groups(prompts: list, groups: list[list], config, *, advantages: Tensor | None = None,
                index: list[int] | None = None, mask_truncated: bool = False) -> Packed:  # fmt: skip
    """Prompts and their completions -> one Packed. advantages (groups, G) or None for zeros.

    mask_truncated: tokens of a completion that ran into the length limit do not count."""
    ids, positions, after, last = [], [], [], []  # of the prompts: all of them come first
    for prompt in prompts:
        ids.append(torch.tensor(prompt.expanded))
        positions.append(mrope_positions(prompt.expanded, prompt.grid, config, prompt.seconds))  # (3, P)
        after.append(int(positions[-1].max()) + 1)  # where its completions go on
        last.append(len(prompt.expanded) - 1 + (last[-1] + 1 if last else 0))  # its last row
    rows, targets, sequence, lengths, advantage, rollout_logp, loss_mask = [], [], [], [], [], [], []
    own, s = last[-1] + 1, 0  # first row of the completion, which completion
    for g, group in enumerate(groups):
        for j, c in enumerate(group):
            n = len(c.token_ids)
            targets.append(torch.tensor(c.token_ids, dtype=torch.int64))
            positions.append(torch.arange(after[g], after[g] + n).expand(3, -1))
            rows.append(torch.tensor([last[g], *range(own, own + n - 1)][:n], dtype=torch.int64))
            sequence.append(torch.full((n,), s))
            lengths.append(n)
            advantage.append(torch.full((n,), 0.0 if advantages is None else float(advantages[g, j])))
            rollout_logp.append(torch.tensor(c.logprobs, dtype=torch.float32))
            loss_mask.append(torch.full((n,), 0.0 if mask_truncated and not c.finished else 1.0))
            own, s = own + n, s + 1
    pictures = [p for p in prompts if p.pixels is not None]
    all_ids = torch.cat(ids + targets)
    layout = tuple((len(p.expanded), tuple(len(c.token_ids) for c in group)) for p, group in zip(prompts, groups))
    return Packed(
        ids=all_ids, positions=torch.cat(positions, dim=1), layout=prefix_attention.Layout(layout, torch.device("cpu")),
        pixels=torch.cat([p.pixels for p in pictures]) if pictures else None,
        grid=torch.cat([p.grid for p in pictures]) if pictures else None,
        picture_rows=torch.isin(all_ids, torch.tensor(shown_ids(config))).nonzero().squeeze(-1),
        rows=torch.cat(rows), targets=torch.cat(targets), sequence=torch.cat(sequence), lengths=torch.tensor(lengths),
        advantages=torch.cat(advantage), rollout_logp=torch.cat(rollout_logp), loss_mask=torch.cat(loss_mask),
        index=list(range(len(prompts))) if index is None else index,
    )  # fmt: skip


def pack(prompts: list, groups: list[list], config, *, token_budget: int, advantages: Tensor | None = None,
         mask_truncated: bool = False) -> list[Packed]:  # fmt: skip
    """All groups -> micro-batches of at most `token_budget` packed tokens, groups whole."""
    packs = plan_packs([group_tokens(p, g) for p, g in zip(prompts, groups)], token_budget)
    return [
        pack_groups([prompts[i] for i in chosen], [groups[i] for i in chosen], config, index=chosen,
                    advantages=None if advantages is None else advantages[chosen], mask_truncated=mask_truncated)
        for chosen in packs
    ]  # fmt: skip


# ---------------------------------------------------------------- the policy


class Policy(nn.Module):
    """The model with its head and its banned ids. Call it on a Packed for the log-probs of the completion tokens."""

    def __init__(self, model, banned: Tensor, *, kernels: bool = True):
        super().__init__()
        self.model = model
        self.config = model.config
        self.kernels = kernels
        self.checkpointed = 0  # language layers
        self.compute_dtype: torch.dtype | None = None  # of sharded weights; their shards may be fp32 (shard_policy)
        self.sharded_tower = False
        self.register_buffer("banned", banned.to(next(model.parameters()).device), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.banned.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.compute_dtype or next(self.model.parameters()).dtype

    @property
    def sharded(self) -> bool:
        return self.compute_dtype is not None

    @property
    def vision(self) -> nn.Module:
        return self.model.model.visual

    @property
    def language(self) -> nn.Module:
        return self.model.model.language_model

    def freeze_vision(self) -> None:
        self.vision.requires_grad_(False)

    @property
    def trains_vision(self) -> bool:
        return next(self.vision.parameters()).requires_grad

    def checkpoint_layers(self, count: int) -> None:
        """The first `count` language layers, and with the first the vision tower, recompute their activations in the
        backward pass instead of keeping them."""
        if count == self.checkpointed:
            return
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for i, layer in enumerate(self.language.layers):
            layer.gradient_checkpointing = i < count
        for block in self.vision.blocks:
            block.gradient_checkpointing = count > 0
        self.checkpointed = min(count, len(self.language.layers))

    def picture_features(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """pixels (patches, C*t*p*p), grid (pictures, 3) on the CPU -> (picture tokens, H), and behind them, in Qwen3-VL, H
        more for each of its first language layers. No graph if frozen."""
        vision, plan = self.config.vision_config, {}
        if hasattr(vision, "window_size"):
            sizes = tuple(tuple(size) for size in grid.tolist())
            plan = vision_plan(sizes, vision.spatial_merge_size, vision.window_size, vision.patch_size, pixels.device)
        with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
            pixels = pixels.to(self.vision.patch_embed.proj.weight.dtype)
            found = self.vision(pixels, grid_thw=grid if plan else grid.to(pixels.device), **plan)
            return torch.cat([found.pooler_output, *(getattr(found, "deepstack_features", None) or ())], dim=1)

    def embed(self, ids: Tensor, picture_rows: Tensor, pixels: Tensor | None, grid: Tensor | None,
              features: Tensor | None = None) -> tuple[Tensor, dict]:  # fmt: skip
        """ids (T,) -> (T, H), the rows of picture placeholders replaced by their features, computed unless given; and what
        else the language model wants of them: `visual_pos_masks` (T,) and the rest of the features, or nothing."""
        embeds = self.language.embed_tokens(ids)  # (T, H)
        if pixels is not None and features is None:
            features = self.picture_features(pixels, grid)
        if features is not None:
            assert len(features) == len(picture_rows), f"{len(features)} features, {len(picture_rows)} placeholders"
            first, *deep = features.to(embeds.dtype).split(embeds.shape[1], dim=1)
            shown = torch.zeros(len(ids), dtype=torch.bool, device=ids.device).index_fill(0, picture_rows, True)
            more = dict(visual_pos_masks=shown, deepstack_visual_embeds=deep) if deep else {}
            return embeds.index_put((picture_rows,), first), more
        if self.sharded_tower or (torch.is_grad_enabled() and self.trains_vision):
            # No picture here, but other ranks may have one: a pass of weight zero keeps the collectives in step.
            merge = self.config.vision_config.spatial_merge_size
            width = self.vision.patch_embed.proj.weight[0].numel()
            blank = torch.zeros(merge * merge, width, device=ids.device)
            features = self.picture_features(blank, torch.tensor([[1, merge, merge]]))
            embeds = embeds + 0.0 * features.sum().to(embeds.dtype)
        return embeds, {}

    def mask(self, dense: Tensor | None) -> Tensor | dict | None:
        """A dense mask, or None for packed groups, as the family's language model takes it."""
        return {"full_attention": dense} if FAMILIES[self.config.model_type]["mask_by_layer_type"] else dense

    def hidden(self, packed: Packed) -> Tensor:
        """The last hidden state of every row that predicts a completion token: (M, H)."""
        # transformers checkpoints in training mode only, and drops the decoding cache there: HFRollout sets it back.
        # Nothing else hangs on the mode, these models have no dropout.
        if self.language.training != (self.checkpointed > 0):
            self.model.train(self.checkpointed > 0)
        embeds, more = self.embed(packed.ids, packed.picture_rows, packed.pixels, packed.grid, packed.features)  # (T, H)
        if more:
            more["visual_pos_masks"] = more["visual_pos_masks"].unsqueeze(0)
        positions = torch.cat([packed.positions[:1], packed.positions])  # (4, T): transformers wants a text row first
        hidden = self.language(
            inputs_embeds=embeds.unsqueeze(0), position_ids=positions.unsqueeze(1),
            attention_mask=self.mask(None), layout=packed.layout, use_cache=False, **more,
        ).last_hidden_state.squeeze(0)  # (T, H)  # fmt: skip
        return hidden[packed.rows]

    def forward(self, packed: Packed, *, temperature: float = 1.0, scale: Tensor | None = None, **settings):
        """Log-prob and entropy of every completion token, (M,) fp32 each. The head sees completion rows only.

        With `scale` (M,), the weight of each token, and the settings of kernels/policy_loss.py: the loss () in one pass
        over head and loss together, its statistics, and log-probs and entropy without a graph."""
        head, own = self.model.lm_head.weight, dict(temperature=temperature, banned=self.banned, reference=not self.kernels)
        if scale is None:
            return token_logprob(self.hidden(packed), head, packed.targets, **own)
        settings |= dict(old_logp=packed.old_logp, ref_logp=packed.ref_logp,
                         rollout_logp=packed.rollout_logp if settings["importance_cap"] > 0 else None)  # fmt: skip
        if settings["loss"] == "gspo":  # a token's loss needs its whole sequence's log-probs first
            logp, entropy = token_logprob(self.hidden(packed), head, packed.targets, **own)
            loss, seen = policy_loss(logp, packed.advantages, scale, lengths=packed.lengths, entropy=entropy,
                                     reference=not self.kernels, **settings)  # fmt: skip
            return loss, seen, logp.detach(), entropy.detach()
        return linear_policy_loss(self.hidden(packed), head, packed.targets, packed.advantages, scale, **own, **settings)

    def next_logits(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache, **more) -> Tensor:
        """One decoding step with a cache (HFRollout). embeds (B, t, H), positions (3, B, t), mask (B, 1, t, cached + t)
        bool -> fp32 logits of the last row (B, V), banned ids at -inf."""
        hidden = self.language(
            inputs_embeds=embeds, position_ids=torch.cat([positions[:1], positions]), use_cache=True,
            attention_mask=self.mask(mask), past_key_values=cache, **more,
        ).last_hidden_state[:, -1]  # (B, H)  # fmt: skip
        return self.model.lm_head(hidden).float().masked_fill(self.banned, float("-inf"))


@lru_cache(maxsize=32)
def vision_plan(sizes: tuple[tuple[int, int, int], ...], merge: int, window: int, patch: int, device) -> dict:
    """Everything the vision tower derives from picture sizes: rope positions, segment and window bounds.

    transformers computes it on every call, in a Python loop over pictures with a device synchronisation each; given as
    arguments it is taken as it is. Pictures of a data set repeat their sizes, hence the cache."""
    from transformers import vision_utils

    grid = torch.tensor(sizes)
    bounds = vision_utils.get_vision_cu_seqlens(grid)
    window_index, window_bounds = vision_utils.get_vision_window_index(
        grid, spatial_merge_size=merge, window_size=window, patch_size=patch
    )
    plan = dict(position_ids=vision_utils.get_vision_position_ids(grid, merge), cu_seqlens=bounds,
                window_index=window_index, cu_window_seqlens=window_bounds)  # fmt: skip
    longest = dict(max_seqlen=int(bounds.diff().max()), max_window_seqlen=int(window_bounds.diff().max()))
    return {name: tensor.to(device) for name, tensor in plan.items()} | longest


def load_policy(source: str, *, freeze_vision: bool = False, never_stop: bool = False, **how) -> tuple[Policy, object]:
    """A policy ready to train, and its processor; never_stop bans the stop tokens; `how` goes to load_model."""
    model, processor = load_model(source, **how)
    banned = banned_ids(processor, model, stop_ids(processor) if never_stop else ())
    policy = Policy(model, banned, kernels=how.get("kernels", True))
    if freeze_vision:
        policy.freeze_vision()
    return policy, processor


def frozen_copy(policy: Policy) -> Policy:
    """The reference policy: same weights now, never trained."""
    reference = copy.deepcopy(policy)
    return reference.requires_grad_(False).eval()


def add_lora(policy: Policy, rank: int) -> None:
    """Freezes the policy and gives every linear layer of its language model a trained low-rank correction (peft), scaled
    by 2: the form of the paper's SFT baseline. `weights` hands the sums out, so engine and checkpoint know nothing of it."""
    from peft import LoraConfig, inject_adapter_in_model

    names = r".*language_model\.layers\..*_proj"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), policy.model)
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor, bool]]:
    """(Hugging Face name, tensor, is it trained) of every parameter; of a layer with a low-rank correction, their sum."""
    corrected = {name: module for name, module in policy.model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, parameter in policy.model.named_parameters():
        layer, _, rest = name.partition(".base_layer.")
        if "lora_" in name:
            continue
        if layer in corrected and rest == "weight":
            delta = corrected[layer].get_delta_weight("default")
            yield f"{layer}.weight", (parameter.detach().float() + delta.detach().float()).to(parameter.dtype), True
        else:
            yield f"{layer}.{rest}" if rest else name, parameter, parameter.requires_grad


def shard_policy(policy: Policy, *, masters: bool = True, tower: bool = True, host: bool = False) -> Policy:
    """Cuts the parameters over all ranks, in place, with FSDP2: a group a language layer and vision block, and one of the
    rest (embeddings, head, norms), which Policy.forward gathers. Every group is gathered for its pass and freed after it.

    masters: the shards become fp32, computed with in the dtype they had; gradients are summed, not averaged, in fp32.
    tower False leaves the vision tower whole: a frozen one runs for pictures only, and not equally often on every rank.
    host: shards lie in pinned host memory and visit the GPU group by group. Needs a process group, with one rank too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    compute, on_gpu = policy.dtype, policy.device.type == "cuda"
    settings = dict(
        mesh=init_device_mesh(policy.device.type, (dist.get_world_size(),)), reshard_after_forward=True,
        # inputs stay as they are: the tower's rope is computed in fp32 and would be rounded
        mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if host and on_gpu else OffloadPolicy(),
    )  # fmt: skip
    for part in [*policy.language.layers, *(policy.vision.blocks if tower else ())]:
        fully_shard(part, **settings)
    fully_shard(policy, **settings, ignored_params=None if tower else set(policy.vision.parameters()))
    for part in policy.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # otherwise the factor 1 takes an operation that only NCCL has
    policy.compute_dtype, policy.sharded_tower = compute, tower
    if masters:
        policy.float()
        if not tower:
            policy.vision.to(compute)
    return policy


def weights(policy: Policy, *, dtype: torch.dtype | None = torch.bfloat16, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every parameter, one at a time: what the engine and the checkpoint get. Of a sharded
    policy on every rank, all of which must take all of them.

    dtype None leaves them as they are computed with: rounding a float32 policy to bf16 for an engine that computes in
    float32 would make a gap between the two. trained=True leaves frozen parameters out."""
    tied, dtype = policy.config.tie_word_embeddings, dtype or policy.dtype
    sharded = []
    for name, parameter, is_trained in named_weights(policy):
        if (tied and name == "lm_head.weight") or (trained and not is_trained):
            continue
        if isinstance(parameter, DTensor):
            sharded.append((name, parameter))
        else:
            yield name, parameter.detach().to(dtype)
    yield from gathered(sharded, dtype, policy.device)


@torch.no_grad()
def gathered(sharded: list[tuple[str, Tensor]], dtype: torch.dtype, device, bucket: int = 1 << 28) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of sharded parameters, by one all-gather for each `bucket` numbers: tensor by tensor most of the time
    would be waiting. A parameter of n rows lies on W ranks in ceil(n / W) rows each, the last ones short or empty."""
    world = dist.get_world_size() if sharded else 1
    while sharded:
        sizes = [-(-p.shape[0] // world) * math.prod(p.shape[1:]) for _, p in sharded]  # with padding, a rank
        count = max(1, sum(total * world <= bucket for total in accumulate(sizes)))
        part, sizes, sharded = sharded[:count], sizes[:count], sharded[count:]
        own = torch.zeros(sum(sizes), dtype=dtype, device=device)
        for (_, parameter), place in zip(part, own.split(sizes)):
            local = parameter.to_local().flatten()
            place[: len(local)].copy_(local)
        everyone = own.new_empty(world * len(own))
        dist.all_gather_into_tensor(everyone, own)
        for (name, parameter), rows in zip(part, everyone.view(world, -1).split(sizes, dim=1)):  # (world, size)
            yield name, rows.reshape(-1)[: parameter.numel()].view(parameter.shape)


def save_hf(policy: Policy, processor, folder: Path, *, write: bool = True) -> None:
    """A folder that `from_pretrained` and vLLM load as it is, in bf16. Every rank of a sharded policy calls it, one with
    write=True; the whole weights are in its host memory only."""
    if not write and not policy.sharded:
        return
    state = {}
    for name, tensor in weights(policy):
        if write:
            state[name] = tensor.to("cpu", copy=True)  # parameters may be parts of one buffer, which safetensors refuses
    if not write:
        return
    if policy.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    policy.model.save_pretrained(folder, state_dict=state)
    config = copy.deepcopy(policy.config)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.bfloat16
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in Path(folder).glob("*.safetensors"):  # written for the owner alone; a checkpoint is to be shared
        file.chmod(0o644)
