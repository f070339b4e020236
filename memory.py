"""GPU memory of a training step: what each phase holds, and how much of the backward pass must be recomputed to fit.

Bytes of weights and optimiser follow from shapes. Activations are counted from what autograd keeps of one layer and one
token (docs/performance.md compares the count with measurements).
"""

import math

import torch

import ranks
from kernels.logprob import CHUNK_BYTES
from optim import STATE_BYTES

GIB = 2**30
SHARDS = ("auto", "none", "optimizer", "fsdp")
REFERENCES = ("auto", "gpu", "sharded", "host")
SLACK = 3 * GIB  # fragments of the allocator, workspaces, picture features, the graph's small tensors


def layer_bytes(config) -> int:
    """What one language layer keeps of one token for its backward pass, bf16, with Liger's norms and SwiGLU: the two inputs
    of the norms, their outputs, query and attention output, key and value, gate, up and their product."""
    query, key_value = (head_width(config) * heads for heads in (config.num_attention_heads, config.num_key_value_heads))
    return 2 * (4 * config.hidden_size + 2 * query + 2 * key_value + 3 * config.intermediate_size)


def head_width(config) -> int:
    """Qwen3-VL names it; elsewhere the heads share the hidden width."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def vision_bytes(config) -> int:
    """The same of all blocks of the vision tower for one patch: its activation functions are plain torch."""
    return 2 * config.depth * (12 * config.hidden_size + 4 * config.intermediate_size)


def head_bytes(config) -> int:
    """One chunk of logits with its gradient, and the gradient of the head in fp32 and in bf16."""
    return CHUNK_BYTES + 6 * config.vocab_size * config.hidden_size


def activations(policy, tokens: int, patches: int, checkpointed: int) -> int:
    """Bytes alive when the forward pass of one micro-batch ends and its backward pass begins."""
    text, vision = policy.config.text_config, policy.config.vision_config
    kept = (text.num_hidden_layers - checkpointed) * layer_bytes(text) + checkpointed * 2 * text.hidden_size
    one_layer = layer_bytes(text) if checkpointed else 0  # the one that is being recomputed
    tower = vision_bytes(vision) if policy.trains_vision else 0
    if checkpointed:  # its blocks are recomputed too
        tower = tower // vision.depth + 2 * vision.depth * vision.hidden_size
    return tokens * (kept + one_layer) + patches * tower


def layers_to_checkpoint(policy, optimizer, packs: list, wanted: int | None) -> int:
    """How many language layers to recompute so that the largest micro-batch fits beside what the step will still
    allocate: `wanted`, or as few as possible on a GPU and none elsewhere. The same on every rank."""
    depth = policy.config.text_config.num_hidden_layers
    if wanted is not None or policy.device.type != "cuda" or not packs:
        return min(depth, wanted or 0)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free -= optimizer.bytes_to_come() + head_bytes(policy.config.text_config) + SLACK
    free -= gathered_bytes(policy) if policy.sharded else 0
    sizes = [(len(p.ids), 0 if p.pixels is None else len(p.pixels)) for p in packs]
    fits = (n for n in range(depth) if all(activations(policy, *size, n) <= free for size in sizes))
    return max(ranks.gather(next(fits, depth)))


def gathered_bytes(policy) -> int:
    """What fsdp holds beside its shards in the middle of a backward pass: the weights of the root group (embeddings, head)
    and of two layers, and of each group its gradient, and that once more in fp32 on its way to the other ranks."""
    width = policy.dtype.itemsize
    layer = sum(p.numel() for p in policy.language.layers[0].parameters())
    inside = sum(p.numel() for part in (*policy.language.layers, *policy.vision.blocks) for p in part.parameters())
    root = sum(p.numel() for p in policy.model.parameters()) - inside
    return (root + 2 * layer) * (2 * width + 4)


def held(cfg, policy, world: int, shard: str, reference: str) -> dict[str, float]:
    """Bytes that one rank holds from the first step on, by cause; shard and reference as choose_shard returns them."""
    width = policy.dtype.itemsize
    everything = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    owned = trained / (1 if shard == "none" else world)
    master, moments = STATE_BYTES[cfg.optimizer]
    if shard == "fsdp":  # the shards are the masters; a frozen tower is whole
        weights, master = width * (everything - trained), 4
    else:
        weights, master = width * everything, master if width < 4 else 0
    share = {"none": 0.0, "gpu": 1.0, "sharded": 1 / world, "host": 0.0}[reference]
    return {"weights": weights, "masters": master * owned, "moments": 0 if cfg.offload_moments else moments * owned,
            "reference": width * everything * share}  # fmt: skip


def update(cfg, policy, world: int, shard: str) -> dict[str, float]:
    """Bytes that come on top during the update, with every layer recomputed unless cfg.checkpoint_layers says otherwise."""
    text = policy.config.text_config
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    layers = text.num_hidden_layers if cfg.checkpoint_layers is None else cfg.checkpoint_layers
    return {
        "gradients": 4 * trained / (world if shard == "fsdp" else 1),
        "gathered": gathered_bytes(policy) if shard == "fsdp" else 0,
        "activations": activations(policy, cfg.token_budget, 0, layers), "head": head_bytes(text), "reserve": SLACK,
    }  # fmt: skip


def choose_shard(cfg, policy, world: int, *, reference: str = "none", engine: float = 0.0,
                 total: float | None = None) -> tuple[str, str]:  # fmt: skip
    """What `auto` of --shard and --reference means here; reference `none` where there is none.

    As little is cut as `total` bytes of GPU memory (this GPU's) allow, with an awake engine that fills the share `engine` of
    them: what is whole needs no communication in the forward pass, and none when the engine gets the weights."""

    def choice(shard: str) -> tuple[str, str]:
        return shard, reference if reference != "auto" else "sharded" if shard == "fsdp" else "gpu"

    if cfg.shard != "auto":
        return choice(cfg.shard)
    if world == 1 or cfg.optimizer == "muon":
        return choice("none")
    if total is None:
        total = torch.cuda.get_device_properties(policy.device).total_memory if policy.device.type == "cuda" else math.inf
    always = sum(held(cfg, policy, world, *choice("optimizer")).values())
    fits = always + max(sum(update(cfg, policy, world, "optimizer").values()), engine * total if engine else 0) <= total
    return choice("optimizer" if fits or cfg.optimizer == "kahan" else "fsdp")


def estimate(cfg, policy, engine: float, world: int, shard: str, reference: str) -> dict[str, dict[str, float]]:
    """GiB by phase and cause of one rank, for train_grpo.py --dry-run; engine: GiB the awake engine fills, 0 without."""
    text, width = policy.config.text_config, policy.dtype.itemsize
    always = {cause: size / GIB for cause, size in held(cfg, policy, world, shard, reference).items()}
    if engine:
        sampling = {"engine": engine}
    else:
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width(text) * width
        sampling = {"key-value cache": cfg.rollout_sequences * (cfg.max_prompt_tokens + cfg.max_completion_tokens) * cache / GIB}
    everything = sum(p.numel() for p in policy.model.parameters())
    return {
        "generate": {**always, **sampling},
        "update": {**always, **{cause: size / GIB for cause, size in update(cfg, policy, world, shard).items()}},
        "save": {**always, "copy on the host": everything * 2 / GIB},
    }


def table() -> str:
    """docs/memory.md's table: the published presets on cards of 80 and 141 GB, as auto would run them."""
    import train_grpo
    from model import load_policy

    lines = ["| preset | card | GPUs | --shard | generate | update | save | fits |", "|---|---|---|---|---|---|---|---|"]
    for name in ("3b", "7b"):
        policy, _ = load_policy(f"random:{name}", device="meta", dtype=torch.bfloat16, kernels=False)
        cfg = train_grpo.PRESETS[f"spatialthinker-{name}"][1]
        for card in (80e9, 141e9):
            for world in (1, 2, 4, 8):
                how = choose_shard(cfg, policy, world, reference="auto", engine=cfg.engine_memory, total=card)
                phases = estimate(cfg, policy, cfg.engine_memory * card / GIB, world, *how)
                sums = [sum(parts.values()) for parts in phases.values()]
                lines.append(f"| spatialthinker-{name} | {card / 1e9:.0f} GB | {world} | {how[0]} | "
                             + " | ".join(f"{x:.0f}" for x in sums) + f" | {'yes' if max(sums[:2]) < card / GIB else 'no'} |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
