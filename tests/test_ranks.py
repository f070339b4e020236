"""Two and four ranks through gloo: gradient, weights, metrics and the end of a run do not depend on how many there are,
nor on what of the model is cut over them.

    PYTHONPATH=. python -m torch.distributed.run --nproc_per_node 2 tests/test_ranks.py OUT      as the tests start it

Every case runs in one set of processes, which write down what they computed; the tests compare it with this process.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_group, make_prompt, new_policy, saved_masters, search_path

import ranks
import train_grpo
from data.pictures import BrokenPicture
from data.scenes import scene_rows
from files import FullDisk
from metrics import Clock
from model import group_tokens, load_model, save_hf, weights
from rollout import Completion
from sampling import collect, take
from train_grpo import Config, prepare, train_step

BASE = Config(kl="k3", kl_coef=0.5, importance_cap=0.0, token_budget=10_000, mini_batches=1, lr=1e-3, steps=10)

# name -> (config, batch)
CASES = {
    "token": (replace(BASE, normalize="token"), "unequal"),
    "sequence": (replace(BASE, normalize="sequence"), "unequal"),
    "two optimiser steps": (replace(BASE, normalize="token", mini_batches=2), "unequal"),
    "unequal micro-batches": (replace(BASE, normalize="token", token_budget=60), "unequal"),
    "pictures on one rank only": (replace(BASE, normalize="token"), "pictures on rank 0"),
    "unequal micro-batches and pictures": (replace(BASE, normalize="sequence", token_budget=60), "pictures on rank 0"),
}
# (pictures, completion lengths) of each prompt; dealt out like cards, so rank 0 has the even ones
BATCHES = {
    "unequal": [(0, (2, 3)), (1, (30, 21)), (1, (1, 1)), (0, (40, 17)),
                (0, (4, 2)), (1, (9, 33)), (0, (1, 5)), (2, (28, 8))],
    "pictures on rank 0": [(1, (2, 3)), (0, (30, 21)), (2, (1, 1)), (0, (40, 17)),
                           (1, (4, 2)), (0, (9, 33)), (1, (1, 5)), (0, (28, 8))],
}  # fmt: skip


def batch(policy, processor, name: str):
    """The whole batch of all ranks: prompts, groups, advantages (8, 2)."""
    shapes = [(), ((84, 56),), ((56, 56), (112, 56))]
    prompts = [make_prompt(processor, f"question {i}", shapes[n], seed=i) for i, (n, _) in enumerate(BATCHES[name])]
    groups = [make_group(policy, lengths, seed=i) for i, (_, lengths) in enumerate(BATCHES[name])]
    return prompts, groups, torch.linspace(-1.5, 2.0, 16).view(8, 2)


def one_case(name: str, rank: int, world: int, shard: str = "none", reference: str = "gpu", *, device: str = "cpu",
             dtype: torch.dtype = torch.float32) -> dict:  # fmt: skip
    """Gradients of every optimiser step, summed over ranks; whole weights after them; metrics."""
    cfg, rows = CASES[name]
    cfg = replace(cfg, shard=shard)
    policy, processor = new_policy(dtype=dtype)
    policy.to(device)
    other, optimizer = prepare(cfg, policy, reference=reference)
    with torch.no_grad():  # away from its reference
        for p in policy.parameters():
            p.mul_(1.02)
    gradients, micro_batches = [], []
    policy.register_forward_hook(lambda module, args, out: micro_batches.append(out[0].requires_grad))
    reduce = optimizer.reduce

    def recording():
        parts = reduce()
        gradients.append(whole_gradients(optimizer, parts))
        return parts

    optimizer.reduce = recording
    prompts, groups, advantages = batch(policy, processor, rows)
    own = prompts[rank::world], groups[rank::world], advantages[rank::world]
    metrics = train_step(policy, other, optimizer, *own, cfg, step=0)
    gradients = [[g.cpu() for g in step] for step in gradients]
    return dict(gradients=gradients, weights=whole(policy), metrics=metrics, micro_batches=sum(micro_batches))


def whole(policy) -> list[torch.Tensor]:
    return [tensor.to("cpu", copy=True) for _, tensor in sorted(weights(policy, dtype=None), key=lambda pair: pair[0])]


def whole_gradients(optimizer, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What all ranks step, put together, in the order of `whole`."""
    found = []
    for bucket, part in zip(optimizer.buckets, parts):
        if optimizer.layout == "fsdp":
            found.append(bucket.parameter.grad.full_tensor())
        elif optimizer.cut:
            slices = [torch.empty_like(part) for _ in range(dist.get_world_size())]
            dist.all_gather(slices, part.contiguous())
            found += [view.clone() for view in bucket.views(torch.cat(slices))]
        else:
            found += [view.clone() for view in bucket.views(part)]
    return [gradient for _, gradient in sorted(zip(optimizer.names, found), key=lambda pair: pair[0])]


# ---------------------------------------------------------------- other things that the ranks do


def train(policy, processor, optimizer, steps: range, rank: int, world: int, shard: str) -> None:
    """A few steps that see other groups each."""
    prompts, groups, advantages = batch(policy, processor, "unequal")
    for step in steps:
        order = [(i + 3 * step) % 8 for i in range(8)]
        own = [[x[i] for i in order][rank::world] for x in (prompts, groups)]
        train_step(policy, None, optimizer, *own, advantages[order][rank::world], replace(LATER, shard=shard), step=step)


def saved_and_gone_on(out: Path, shard: str, rank: int, world: int) -> list[torch.Tensor]:
    """Three steps, a checkpoint of the optimiser after the second."""
    policy, processor = new_policy()
    _, optimizer = prepare(replace(LATER, shard=shard), policy)
    train(policy, processor, optimizer, range(2), rank, world, shard)
    torch.save(optimizer.state_dict(), out / f"{shard}-{rank}.pt")
    train(policy, processor, optimizer, range(2, 3), rank, world, shard)
    save_hf(policy, processor, out / f"{shard}-hf", write=rank == 0)
    return whole(policy)


def resumed(states: list[dict], shard: str, rank: int, world: int) -> list[torch.Tensor]:
    """The third of those steps, on another number of ranks, from other weights."""
    policy, processor = new_policy(seed=5)
    _, optimizer = prepare(replace(LATER, shard=shard), policy)
    optimizer.load_state_dict(states)
    train(policy, processor, optimizer, range(2, 3), rank, world, shard)
    return whole(policy)


def poisoned(shard: str, rank: int, world: int) -> dict:
    """A step in which one gradient of one rank is not finite."""
    policy, processor = new_policy()
    _, optimizer = prepare(replace(LATER, shard=shard), policy)
    before = whole(policy)
    prompts, groups, advantages = batch(policy, processor, "unequal")
    if rank == 1:
        advantages[rank::world] = math.nan
    metrics = train_step(policy, None, optimizer, prompts[rank::world], groups[rank::world], advantages[rank::world],
                         replace(LATER, shard=shard), step=0)  # fmt: skip
    same = all(torch.equal(a, b) for a, b in zip(before, whole(policy), strict=True))
    return dict(skipped=metrics["optim/skipped"], same=same, state=any(inner.state for inner in optimizer.inner))


class Fixed:
    """An engine whose answers hang on the row alone: lengths from 1 to 24, texts that name row and number."""

    keeps_frozen = True

    def wake(self, weights):
        pass

    def sleep(self):
        pass

    def memory(self):
        return {}

    def generate(self, prompts, *, n, **_):
        def answer(prompt, j):
            length = 1 + zlib.crc32(f"{prompt.row['id']}{j}".encode()) % 24
            return Completion([7] * length, [0.0] * length, f"{prompt.row['id']}/{j}", True)

        counts = [n] * len(prompts) if isinstance(n, int) else n
        return [[answer(prompt, j) for j in range(count)] for prompt, count in zip(prompts, counts, strict=True)]


def is_live(row: dict) -> bool:
    return zlib.crc32(row["id"].encode()) % 5 < 2


class Judge:
    """Three rows of five get equal rewards."""

    def score(self, texts, rows):
        totals = [float(t[-1]) if is_live(row) else 0.0 for t, row in zip(texts, rows, strict=True)]
        return [{"total": total, "accuracy": total, "text": text} for total, text in zip(totals, texts, strict=True)]


def collected(rank: int, world: int, **changes) -> dict:
    """Two steps of `collect`: which rows this rank got, with what, and where the cursor went."""
    cfg = Config(prompts_per_step=8, group_size=2, mini_batches=2, min_pixels=784, max_pixels=112 * 112, style="short", **changes)
    policy, processor = new_policy()
    rows, cursor, found = scene_rows(40, level="easy"), 0, []
    if cfg.temporal:  # every other row with a clip
        rows = [row | {"images": [], "video": row["images"] * 4, "fps": 2} if i % 2 else row for i, row in enumerate(rows)]
    for step in range(2):
        share, cursor, metrics = collect(cfg, policy, Fixed(), processor, Judge(), rows, cursor, step, Clock(), rank, world)
        found.append(dict(
            ids=[row["id"] for row in share.rows], prompts=[p.row["id"] for p in share.prompts], cursor=cursor, metrics=metrics,
            texts=[[c.text for c in group] for group in share.groups], parts=[part["text"] for part in share.parts],
            rewards=share.rewards, tokens=[group_tokens(p, g) for p, g in zip(share.prompts, share.groups)],
        ))  # fmt: skip
    return found


COLLECTED = {
    "plain": {}, "dynamic": dict(dynamic_sampling=True), "short": dict(dynamic_sampling=True, max_rounds=1),
    "clips": dict(temporal=True, dynamic_sampling=True),
}  # fmt: skip
LATER = replace(BASE, kl="none", kl_coef=0.0, normalize="token", mini_batches=1)
MODES = ("none", "optimizer", "fsdp")
AT_FOUR = ("two optimiser steps", "unequal micro-batches and pictures")


def worker(out: Path) -> None:
    torch.set_num_threads(1)
    rank, world, *_ = ranks.setup("cpu")
    cases = CASES if world == 2 else AT_FOUR
    found = {(name, shard): one_case(name, rank, world, shard) for name in cases for shard in MODES}
    found["sharded reference"] = one_case("unequal micro-batches and pictures", rank, world, "optimizer", "sharded")
    found["poisoned"] = {shard: poisoned(shard, rank, world) for shard in MODES}
    for name, changes in COLLECTED.items():
        found[name] = collected(rank, world, **changes)
    if world == 2:
        found["gone on"] = {shard: saved_and_gone_on(out, shard, rank, world) for shard in MODES}
    else:
        files = {shard: [out.parent / "two" / f"{shard}-{r}.pt" for r in range(2)] for shard in MODES}
        states = {shard: [torch.load(file, weights_only=True) for file in found] for shard, found in files.items()}
        found["resumed"] = {shard: resumed(states[shard], shard, rank, world) for shard in ("optimizer", "fsdp")}
    found["gathered"] = ranks.gather({"rank": rank})
    found["spread"] = [
        (by, item, str(error)) for by, item, error in
        ranks.spread(lambda items: [(rank, item, BrokenPicture(f"no {item}")) for item in items], list(range(5)), part=4)
    ]  # fmt: skip
    torch.save(found, out / f"rank{rank}.pt")
    ranks.leave()


def torchrun(folder: Path, *arguments: str, count: int = 2) -> subprocess.Popen:
    """Ranks under torchrun, started but not waited for."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *arguments]  # fmt: skip
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def finish(process: subprocess.Popen, seconds: float) -> tuple[str, str]:
    """stdout and stderr once it has ended; past the limit it and its ranks are killed and the test fails."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [map(int, line.split()) for line in table.splitlines()]
        for pid in [pid for pid, parent in pairs if parent == process.pid] + [process.pid]:  # ranks have own sessions
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"not over after {seconds:g} s\n{out[-2000:]}\n{err[-4000:]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def run_ranks(out: Path, count: int, file: str = __file__) -> list[dict]:
    out.mkdir()
    process = torchrun(ROOT, file, str(out), count=count)
    _, err = finish(process, 300)
    assert process.returncode == 0, err[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.fixture(scope="module")
def two_ranks(folder):
    return run_ranks(folder / "two", 2)


@pytest.fixture(scope="module")
def four_ranks(folder, two_ranks):
    """After the two, whose checkpoint they go on from."""
    return run_ranks(folder / "four", 4)


@pytest.fixture(scope="module")
def one_rank():
    return {name: one_case(name, 0, 1) for name in CASES}


def assert_close(found, expected, tolerance=1e-5):
    largest = max(float(g.abs().max()) for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-3 * largest)


def assert_same_step(found: dict, expected: dict) -> None:
    """Gradients, and weights where they say something: Adam's first step is the sign of a gradient, near 0 rounding's."""
    assert len(found["gradients"]) == len(expected["gradients"])
    # after an update the weights differ by rounding, which Adam's first step magnifies: the first is compared tightly
    assert_close(found["gradients"][0], expected["gradients"][0])
    for a, b in zip(found["gradients"][1:], expected["gradients"][1:]):
        assert_close(a, b, tolerance=1e-2)
    near = [(a - b).abs() < 1e-5 for a, b in zip(found["weights"], expected["weights"], strict=True)]
    assert sum(n.sum() for n in near) > 0.99 * sum(n.numel() for n in near)


@pytest.mark.parametrize("shard", MODES)
@pytest.mark.parametrize("name", CASES)
def test_rule_06_ranks_do_not_change_the_step(two_ranks, one_rank, name, shard):
    """Token and sequence means, KL included, with very unequal shares of tokens, whatever is cut over the ranks."""
    gradients = one_rank[name]["gradients"]
    assert len(gradients) == CASES[name][0].mini_batches and max(float(g.abs().max()) for g in gradients[0]) > 0
    for own in two_ranks:
        assert_same_step(own[name, shard], one_rank[name])


@pytest.mark.parametrize("shard", MODES)
@pytest.mark.parametrize("name", AT_FOUR)
def test_rule_06_four_ranks_do_not_change_the_step(four_ranks, one_rank, name, shard):
    for own in four_ranks:
        assert_same_step(own[name, shard], one_rank[name])


@pytest.mark.parametrize("shard", MODES)
@pytest.mark.parametrize("name", CASES)
def test_rule_06_ranks_stay_bit_for_bit_alike(two_ranks, name, shard):
    first, second = (own[name, shard] for own in two_ranks)
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize("shard", MODES)
@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_one_rank(two_ranks, one_rank, name, shard):
    expected, found = one_rank[name]["metrics"], two_ranks[0][name, shard]["metrics"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key != "rollout/logprob_gap_p99":  # a quantile of each micro-batch
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_a_sharded_reference_is_the_same_reference(two_ranks, four_ranks, one_rank):
    expected = one_rank["unequal micro-batches and pictures"]
    assert expected["metrics"]["loss/kl"] > 0
    for own in (*two_ranks, *four_ranks):
        assert_same_step(own["sharded reference"], expected)
        assert own["sharded reference"]["metrics"]["loss/kl"] == pytest.approx(expected["metrics"]["loss/kl"], rel=1e-4)


def test_rule_16_ranks_run_the_same_number_of_micro_batches(two_ranks, one_rank):
    """The shares differ so much that without the extra ones the second rank would wait for a reduction for ever."""
    for key in ((name, shard) for name in CASES for shard in MODES):
        assert two_ranks[0][key]["micro_batches"] == two_ranks[1][key]["micro_batches"], key
    policy, processor = new_policy()
    prompts, groups, _ = batch(policy, processor, "unequal")
    shares = [len(train_grpo.pack(prompts[r::2], groups[r::2], policy.config, token_budget=60)) for r in (0, 1)]
    assert shares[0] < shares[1] == two_ranks[0]["unequal micro-batches", "none"]["micro_batches"]


def test_rule_16_a_rank_without_pictures_has_the_vision_gradients_too(two_ranks):
    names = sorted(name for name, _ in new_policy()[0].named_parameters())
    for own in two_ranks:
        for shard in MODES:
            (gradients,) = own["pictures on one rank only", shard]["gradients"]
            vision = [g for name, g in zip(names, gradients, strict=True) if "visual" in name]
            assert vision and all(g.abs().max() > 0 for g in vision)


@pytest.mark.parametrize("shard", MODES)
def test_rule_11_one_ranks_bad_gradient_skips_the_step_on_all(two_ranks, four_ranks, shard):
    for own in (*two_ranks, *four_ranks):
        assert own["poisoned"][shard] == dict(skipped=1.0, same=True, state=False)


def test_gathering(two_ranks):
    assert all(own["gathered"] == [{"rank": 0}, {"rank": 1}] for own in two_ranks)


def test_work_shared_out_comes_back_in_order_on_all_ranks(two_ranks):
    for own in two_ranks:
        assert own["spread"] == [(by, i, f"no {i}") for i, by in enumerate([0, 0, 1, 1, 0])], "neighbours stay together"
    assert ranks.spread(lambda items: [2 * item for item in items], [3, 4]) == [6, 8]


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("shard", ["optimizer", "fsdp"])
def test_rule_12_a_checkpoint_goes_on_with_another_number_of_ranks(two_ranks, four_ranks, shard):
    expected = two_ranks[0]["gone on"][shard]
    for own in four_ranks:
        assert_close(own["resumed"][shard], expected, tolerance=1e-4)


def test_rule_12_slices_of_two_ranks_go_on_with_one(two_ranks, folder):
    for shard, count in (("optimizer", 2), ("none", 1)):
        states = [torch.load(folder / "two" / f"{shard}-{rank}.pt", weights_only=True) for rank in range(count)]
        assert_close(resumed(states, "none", 0, 1), two_ranks[0]["gone on"][shard], tolerance=1e-4)
    with pytest.raises(ValueError, match="optimiser of 1 ranks, 2 wrote it"):
        resumed([torch.load(folder / "two" / "optimizer-0.pt", weights_only=True)], "none", 0, 1)
    with pytest.raises(ValueError, match="written with fsdp, this run has flat: give the old --shard"):
        resumed([torch.load(folder / "two" / f"fsdp-{rank}.pt", weights_only=True) for rank in (0, 1)], "none", 0, 1)


@pytest.mark.parametrize("shard", MODES)
def test_a_checkpoint_of_shards_loads_like_any_other(two_ranks, folder, shard):
    model, _ = load_model(str(folder / "two" / f"{shard}-hf"))
    saved = [p for _, p in sorted(model.named_parameters())]
    for a, b in zip(saved, two_ranks[0]["gone on"][shard], strict=True):
        assert torch.equal(a, b.bfloat16().float())


# ---------------------------------------------------------------- groups over ranks


@pytest.mark.parametrize("world", [1, 2, 4])
def test_balance_evens_out_costs_and_keeps_counts(world):
    generator = torch.Generator().manual_seed(world)
    for spread in (0, 100, 5000):
        costs = (1000 + spread * torch.rand(64, generator=generator)).tolist()
        owners = ranks.balance([i % world for i in range(64)], costs, world)
        loads = [sum(c for c, owner in zip(costs, owners) if owner == rank) for rank in range(world)]
        assert [owners.count(rank) for rank in range(world)] == [64 // world] * world
        assert max(loads) - min(loads) <= 0.02 * sum(costs) / world
        if spread == 0:
            assert owners == [i % world for i in range(64)], "nothing to gain, nothing moves"


def test_balance_moves_whole_counts_first():
    owners = ranks.balance([0, 0, 0, 0, 1, 0], [5.0, 1.0, 1.0, 1.0, 1.0, 3.0], 2)
    assert sorted(owners) == [0, 0, 0, 1, 1, 1]
    loads = [sum(c for c, o in zip([5.0, 1.0, 1.0, 1.0, 1.0, 3.0], owners) if o == rank) for rank in (0, 1)]
    assert sorted(loads) == [5.0, 7.0], "5 + 1 + 1 against 3 + 1 + 1 is the best there is"


def together(world_found: list[dict], name: str, step: int, key: str) -> list:
    return [x for own in world_found for x in own[name][step][key]]


@pytest.mark.parametrize("name", COLLECTED)
def test_ranks_share_the_groups_that_one_rank_would_have(two_ranks, four_ranks, name):
    alone = collected(0, 1, **COLLECTED[name])
    for found in (two_ranks, four_ranks):
        for step in (0, 1):
            assert sorted(together(found, name, step, "ids")) == sorted(alone[step]["ids"])
            assert sorted(map(str, together(found, name, step, "texts"))) == sorted(map(str, alone[step]["texts"]))
            assert sorted(map(str, together(found, name, step, "rewards"))) == sorted(map(str, alone[step]["rewards"]))
            assert any("reward/temporal_term" in one[name][step]["metrics"] for one in found) == (name == "clips")
            for own in (one[name][step] for one in found):
                assert len(own["ids"]) == 8 // len(found) and own["prompts"] == own["ids"]
                assert own["texts"] == [[f"{i}/{j}" for j in range(2)] for i in own["ids"]], "nothing was mixed up"
                assert own["parts"] == [text for group in own["texts"] for text in group]
                assert own["cursor"] == alone[step]["cursor"] and own["metrics"] == found[0][name][step]["metrics"]
            half = 4 // len(found)  # of each mini-batch every rank has as many, and they are the same groups as alone
            first = {i for one in found for i in one[name][step]["ids"][:half]}
            assert first == set(alone[step]["ids"][:4])


def test_dynamic_sampling_keeps_live_groups_and_drops_the_surplus_by_index():
    rows = scene_rows(40, level="easy")
    alive = {row["id"] for row in rows if is_live(row)}
    order = [row["id"] for row in take(rows, 0, 400, Config.seed)]
    assert 8 < len(alive) < 20
    cursor = 0
    for found in collected(0, 1, dynamic_sampling=True, max_rounds=20):
        drawn = order[cursor : found["cursor"]]
        assert found["ids"] == [i for i in drawn if i in alive][:8], "the first live ones in the global order"
        assert found["metrics"]["sampling/drawn"] == len(drawn) > 8 and found["metrics"]["sampling/rounds"] > 1
        assert found["metrics"]["reward/flat_groups"] == pytest.approx(sum(i not in alive for i in drawn) / len(drawn))
        assert (found["rewards"].amax(1) > found["rewards"].amin(1)).all()
        cursor = found["cursor"]


def test_what_dynamic_sampling_does_not_find_is_filled_up():
    plain, short = collected(0, 1), collected(0, 1, dynamic_sampling=True, max_rounds=1)
    for a, b in zip(plain, short, strict=True):
        assert a["ids"] == b["ids"] and a["cursor"] == b["cursor"] and b["metrics"]["sampling/rounds"] == 1


# ---------------------------------------------------------------- dying together

HANG = """
import command, os, ranks, time, torch
import torch.distributed as dist
rank = int(os.environ["RANK"])
with ranks.die_together(rank, world_size=2):
    dist.init_process_group("gloo")
    command.StopSignal(rank=rank)
    dist.barrier()
    if rank == 1:
        raise LookupError("rank one is broken")
    while True:
        WAIT
"""


@pytest.mark.parametrize("wait", [
    "dist.all_reduce(torch.ones(1))",
    pytest.param("time.sleep(1)", marks=pytest.mark.slow),  # a peer that notices nothing, as in an NCCL collective
])
def test_one_rank_that_raises_ends_all_with_its_traceback(tmp_path, wait):
    (tmp_path / "hangs.py").write_text(HANG.replace("WAIT", wait))
    process = torchrun(tmp_path, "hangs.py")
    _, err = finish(process, 60 + 20)  # a minute, and 20 s for starting two interpreters with torch
    assert process.returncode != 0
    assert "[rank 1] LookupError: rank one is broken" in err
    assert '[rank 1]   File "' in err, "the traceback says where"


def test_with_one_rank_errors_just_pass():
    with pytest.raises(LookupError), ranks.die_together(0, world_size=1):
        raise LookupError("x")
    with pytest.raises(SystemExit) as caught, ranks.die_together(1, world_size=2):
        sys.exit(0)
    assert caught.value.code == 0
    with pytest.raises(SystemExit, match="error: metrics.jsonl was not written"), ranks.die_together(0, world_size=1):
        raise FullDisk("metrics.jsonl was not written")


# ---------------------------------------------------------------- whole runs of two ranks

SMALL = (
    "demo --model random:tiny --limit 8 --val-data None --prompts-per-step 4 --group-size 2 --max-completion-tokens 6 "
    "--max-pixels 12544 --token-budget 200 --kl k3 --kl-coef 0.1 --device cpu --lr 1e-3"
).split()
START = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_grpo, tyro
with open(f"pid{{os.environ['RANK']}}", "w") as file:
    file.write(str(os.getpid()))
RANK, calls = int(os.environ["RANK"]), []
inner = train_grpo.train_step
def train_step(*args, **kwargs):
    calls.append(1)
    here()
    return inner(*args, **kwargs)
train_grpo.train_step = train_step
{{here}}
train_grpo.main(tyro.extras.overridable_config_cli(train_grpo.PRESETS))
"""


RAISE = """
def here():
    if RANK == 1 and len(calls) == 2:
        open("raised", "w").close()
        raise ArithmeticError("boiled over")
"""
TERMINATE = """
def here():
    if RANK == 1 and len(calls) == 2 and not os.path.exists("sent"):
        open("sent", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
"""


def script(folder: Path, name: str, here: str) -> str:
    """train_grpo.py with something that happens at the start of each update."""
    (folder / name).write_text(START.replace("{here}", here))
    return name


def is_alive(pid: int) -> bool:
    """A process that has ended but was not yet collected by its parent does not count."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_rule_17_an_exception_on_one_rank_ends_all_of_them_with_its_traceback(tmp_path):
    """Raised by rank 1 in its second update, while rank 0 goes on into a reduction with it."""
    process = torchrun(tmp_path, script(tmp_path, "fails.py", RAISE), *SMALL, "--steps", "50")
    start = time.monotonic()
    while not (tmp_path / "raised").exists() and process.poll() is None and time.monotonic() - start < 200:
        time.sleep(0.1)
    assert (tmp_path / "raised").exists(), finish(process, 1)[1][-4000:]
    _, err = finish(process, 60)  # within a minute of the exception
    assert process.returncode != 0
    assert "[rank 1] ArithmeticError: boiled over" in err
    assert "[rank 1]   File" in err and "in train_step" in err, "with its traceback"
    assert not any(is_alive(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1))


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["optimizer", "fsdp"])
def test_rule_12_two_ranks_stop_together_and_resume_exactly(tmp_path, shard):
    """SIGTERM to rank 1 alone, in the second step: both end after it with status 0, and go on as if nothing was."""
    for folder in ("stopped", "whole"):
        (tmp_path / folder).mkdir()
    name = script(tmp_path / "stopped", "run.py", TERMINATE)
    script(tmp_path / "whole", "run.py", "def here(): pass")
    for folder, resume, lines in (("stopped", (), 2), ("stopped", ("--resume",), 4), ("whole", (), 4)):
        process = torchrun(tmp_path / folder, name, *SMALL, "--steps", "4", "--shard", shard, *resume)
        _, err = finish(process, 240)
        assert process.returncode == 0, err[-4000:]
        assert len(metrics_of(tmp_path / folder)) == lines
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    a, b = (tmp_path / f / "runs" / "demo" / "step_4" for f in ("stopped", "whole"))
    assert len(torch.load(a / "trainer" / "state.pt", weights_only=True)["rng"]) == 2
    assert len(list((a / "trainer").glob("rank_*.pt"))) == 2, "each rank its slice"
    ours, theirs = saved_masters(a), saved_masters(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
