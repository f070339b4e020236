"""optim.py: fp32 masters, skipped steps, schedules, saved state."""

import copy
import math

import pytest
import torch
from torch import nn

import optim
from optim import ALIGN, SCHEDULES, SLICE, Bucket, MasterOptimizer, is_block_matrix, learning_rate


def network(dtype=torch.float32, seed=0) -> nn.Module:
    """Weights of 0.02, as language models have: there bf16 is spaced by 1.2e-4."""
    torch.manual_seed(seed)
    module = nn.ModuleDict({"embed": nn.Embedding(20, 8), "layers": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.02)
            p.copy_(p.bfloat16())  # both dtypes start from the same numbers
    return module.to(dtype)


def output(module, seed: int):
    ids = torch.randint(20, (4,), generator=torch.Generator().manual_seed(seed))
    x = module["embed"](ids)
    for layer in module["layers"]:
        x = x + torch.tanh(layer(x))
    return x.float().square().sum() - x.float().sum()


def train(module, optimizer, steps: int, lr: float) -> list[float]:
    norms = []
    for step in range(steps):
        output(module, step).backward()
        norms.append(optimizer.step(lr=lr))
    return norms


def masters(optimizer) -> list[torch.Tensor]:
    """The fp32 master of every parameter, in its shape."""
    return [view for bucket in optimizer.buckets for view in bucket.views(bucket.master)]


def moved(module, start) -> torch.Tensor:
    return torch.cat([(p.float() - q.float()).flatten() for p, q in zip(module.parameters(), start.parameters())])


# ---------------------------------------------------------------- rule 7: small steps are not lost


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rule_07_a_hundred_steps_of_1e_6_move_bf16_weights_as_fp32_ones(kind):
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        module = network(dtype)
        optimizer = MasterOptimizer(module.named_parameters(), kind=kind)
        train(module, optimizer, 100, 1e-6)
        runs[dtype] = torch.cat([m.detach().flatten() for m in masters(optimizer)])
        assert all(m.dtype == torch.float32 for m in masters(optimizer))
        if dtype == torch.bfloat16:  # the weights are the masters, rounded
            for p, m in zip(module.parameters(), masters(optimizer)):
                assert p.dtype == torch.bfloat16 and torch.equal(p, m.bfloat16())
    start = torch.cat([p.float().flatten() for p in network().parameters()])
    exact, ours = (runs[dtype] - start for dtype in (torch.float32, torch.bfloat16))
    assert 3e-5 < exact.norm() / math.sqrt(len(exact)) < 2e-4  # near 100 x 1e-6 each
    assert (ours - exact).norm() < 0.1 * exact.norm()  # what is left comes from bf16 gradients


def test_rule_07_kahan_moves_what_bf16_and_its_remainder_hold_together():
    """Neither master nor fp32 moments: weight and remainder, both bf16, are the weight."""
    exact, ours = network(), network(torch.bfloat16)
    start = torch.cat([p.float().flatten() for p in exact.parameters()])
    plain = MasterOptimizer(exact.named_parameters())
    train(exact, plain, 100, 1e-6)
    optimizer = MasterOptimizer(ours.named_parameters(), kind="kahan")
    train(ours, optimizer, 100, 1e-6)
    (bucket,) = optimizer.buckets
    state = optimizer.inner[0].state[bucket.master]
    assert bucket.master.dtype == torch.bfloat16 and all(state[k].dtype == torch.bfloat16 for k in ("exp_avg", "exp_avg_sq", "compensation"))
    both = torch.cat([v.flatten() for v in bucket.views(bucket.master.float() + state["compensation"].float())])
    moved_exactly = torch.cat([p.detach().flatten() for p in exact.parameters()]) - start
    assert 3e-5 < moved_exactly.norm() / math.sqrt(len(start)) < 2e-4
    assert (both - start - moved_exactly).norm() < 0.15 * moved_exactly.norm()
    assert state["compensation"].abs().max() > 0 and (moved(ours, network()) != 0).float().mean() > 0.2, "the bf16 weights move too"


def test_kahan_is_adamw_where_nothing_is_lost():
    """Steps far larger than the spacing of bf16, with weight decay."""
    ours, theirs = network(torch.bfloat16), network()
    optimizer = MasterOptimizer(ours.named_parameters(), kind="kahan", weight_decay=0.1)
    plain = MasterOptimizer(theirs.named_parameters(), weight_decay=0.1)
    train(ours, optimizer, 20, 1e-3)
    train(theirs, plain, 20, 1e-3)
    difference = moved(ours, theirs).norm()
    assert difference < 0.1 * moved(theirs, network()).norm()


def test_rule_07_without_masters_bf16_weights_do_not_move():
    """The published pitfall, so that the test above means something: most weights stay exactly where they were."""
    module = network(torch.bfloat16)
    start = copy.deepcopy(module)
    naive = torch.optim.AdamW(module.parameters(), lr=1e-6)
    for step in range(100):
        output(module, step).backward()
        naive.step()
        naive.zero_grad()
    assert (moved(module, start) == 0).float().mean() > 0.9


def test_rule_07_gradients_of_micro_batches_add_up_in_fp32():
    """256 + 1 is 256 in bf16: the small one must survive."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([("w", weight)], max_grad_norm=1e9)
    for size in (256.0, 1.0, 1.0):
        (weight * size).sum().backward()
    assert weight.grad is None, "the low-precision gradient is freed"
    assert optimizer.gradients[0].dtype == torch.float32 and optimizer.gradients[0].tolist() == [258.0] * 3
    assert optimizer.step(lr=0.0) == pytest.approx(258 * math.sqrt(3))


def test_fp32_parameters_are_their_own_masters():
    module = network()
    optimizer = MasterOptimizer(module.named_parameters())
    assert all(m.data_ptr() == p.data_ptr() for m, p in zip(masters(optimizer), module.parameters(), strict=True))


# ---------------------------------------------------------------- the step


def test_it_is_adamw_with_clipping():
    ours, theirs = network(), network()
    optimizer = MasterOptimizer(ours.named_parameters(), weight_decay=0.05, betas=(0.8, 0.95), max_grad_norm=0.5)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.8, 0.95), eps=1e-8)
    for step, norm in enumerate(train(ours, optimizer, 5, 1e-3)):
        output(theirs, step).backward()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))) and norm > 0.5
        plain.step()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_small_gradient_is_not_scaled_up():
    module = network()
    weight = module["layers"][0].weight
    optimizer = MasterOptimizer([("w", weight)], max_grad_norm=100.0)
    optimizer.inner = [torch.optim.SGD([bucket.master for bucket in optimizer.buckets], lr=1.0)]
    before = weight.detach().clone()
    (weight * 0.5).sum().backward()
    assert optimizer.step(lr=1.0) == pytest.approx(0.5 * 8)
    torch.testing.assert_close(weight, before - 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rule_11_a_gradient_that_is_not_finite_skips_the_step(dtype, bad):
    module = network(dtype)
    optimizer = MasterOptimizer(module.named_parameters())
    train(module, optimizer, 2, 1e-3)
    before, state = copy.deepcopy(module), copy.deepcopy(optimizer.state_dict())
    (output(module, 0) + module["layers"][1].weight[0, 0] * bad).backward()
    assert not math.isfinite(optimizer.step(lr=1e-3))
    assert moved(module, before).abs().max() == 0
    after = optimizer.state_dict()
    for a, b in zip(state["slices"], after["slices"], strict=True):
        assert a.keys() >= {"master", "step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(a[key], b[key]) for key in a)  # moments and step count too
    (norm,) = train(module, optimizer, 1, 1e-3)  # nothing of the bad gradient is left
    assert math.isfinite(norm) and moved(module, before).abs().max() > 0


def test_a_parameter_without_gradient_counts_as_zeros():
    """Every rank must reduce the same list, whatever its micro-batches touched."""
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = MasterOptimizer([("used", used), ("unused", unused)])
    used.sum().backward()
    assert [g.tolist() for g in optimizer.gradients] == [[1.0, 1.0], [0.0, 0.0, 0.0]]


def test_frozen_parameters_are_left_alone():
    module = network()
    module["embed"].requires_grad_(False)
    optimizer = MasterOptimizer(module.named_parameters())
    assert not any("embed" in name for name in optimizer.names) and len(optimizer.names) == 4
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        MasterOptimizer(module.named_parameters())
    with pytest.raises(ValueError, match="'sgd'.*adamw.*muon"):
        MasterOptimizer(network().named_parameters(), kind="sgd")


# ---------------------------------------------------------------- muon


def test_muon_steps_the_matrices_of_blocks_only(tiny):
    chosen = [name for name, p in tiny.policy.named_parameters() if is_block_matrix(name, p)]
    assert chosen and all("layers." in name or "blocks." in name for name in chosen)
    assert any("visual.blocks" in name for name in chosen) and any("language_model.layers" in name for name in chosen)
    for part in ("embed_tokens", "norm", "bias", "patch_embed"):
        assert not any(part in name for name in chosen), part


def test_muon_alone_where_only_matrices_are_trained():
    """As with LoRA on a model's layers: nothing is left for AdamW."""
    module = network()
    matrices = [(name, p) for name, p in module.named_parameters() if is_block_matrix(name, p)]
    optimizer = MasterOptimizer(matrices, kind="muon")
    before = [p.detach().clone() for _, p in matrices]
    train(module, optimizer, 1, 1e-2)
    assert matrices and all((p != start).any() for (_, p), start in zip(matrices, before))


def test_muon_trains_every_parameter():
    module = network()
    start = copy.deepcopy(module)
    optimizer = MasterOptimizer(module.named_parameters(), kind="muon")
    groups = [p for inner in optimizer.inner for group in inner.param_groups for p in group["params"]]
    assert sorted(p.data_ptr() for p in groups) == sorted(p.data_ptr() for p in module.parameters())
    train(module, optimizer, 3, 1e-3)
    for a, b in zip(module.parameters(), start.parameters()):
        assert (a != b).any()


# ---------------------------------------------------------------- rule 12: saved state


@pytest.mark.parametrize("kind, dtype", [
    ("adamw", torch.float32), ("adamw", torch.bfloat16), ("muon", torch.float32), ("muon", torch.bfloat16), ("kahan", torch.bfloat16),
])  # fmt: skip
def test_rule_12_a_restored_optimiser_goes_on_bit_for_bit(kind, dtype, tmp_path):
    straight = network(dtype)
    optimizer = MasterOptimizer(straight.named_parameters(), kind=kind)
    train(straight, optimizer, 3, 1e-3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    train(straight, optimizer, 3, 1e-3)

    resumed = network(dtype, seed=7)  # other weights: all of them come from the file
    again = MasterOptimizer(resumed.named_parameters(), kind=kind)
    again.load_state_dict([torch.load(tmp_path / "state.pt", weights_only=True)])
    train(resumed, again, 3, 1e-3)
    for a, b in zip(masters(optimizer) + optimizer.params, masters(again) + again.params, strict=True):
        assert torch.equal(a, b)


def test_the_state_of_another_model_is_refused():
    state = MasterOptimizer(network().named_parameters()).state_dict()
    module = network()
    module["embed"].requires_grad_(False)
    with pytest.raises(ValueError, match="other parameters than this run .*embed.weight"):
        MasterOptimizer(module.named_parameters()).load_state_dict([state])


def test_the_state_of_another_kind_is_refused():
    module = network(torch.bfloat16)
    state = MasterOptimizer(module.named_parameters()).state_dict()
    with pytest.raises(ValueError, match="written with adamw, this run has kahan: give the old --optimizer"):
        MasterOptimizer(module.named_parameters(), kind="kahan").load_state_dict([state])


def test_kinds_that_do_not_go_here_are_refused_in_one_line():
    with pytest.raises(ValueError, match="kahan keeps bf16 weights"):
        MasterOptimizer(network().named_parameters(), kind="kahan")
    with pytest.raises(ValueError, match="adamw8bit needs an NVIDIA GPU"):
        MasterOptimizer(network().named_parameters(), kind="adamw8bit")


def sliced(elements: int, parts: int) -> list[dict]:
    """What `parts` ranks would have saved of a bucket of `elements` numbers: element i is i, blocks of 256 have one scale."""
    size = -(-elements // (SLICE * parts)) * SLICE
    numbers = torch.nn.functional.pad(torch.arange(float(elements)), (0, size * parts - elements))
    return [{"master": numbers[r * size : (r + 1) * size], "absmax1": numbers[r * size : (r + 1) * size : 256], "step": 7,
             "qmap1": torch.arange(256.0)} for r in range(parts)]  # fmt: skip


@pytest.mark.parametrize("old, new", [(1, 2), (2, 1), (2, 4), (4, 3), (8, 3)])
def test_slices_are_cut_anew_whatever_the_numbers_of_ranks(old, new):
    """Scales of 8-bit moments go with their blocks; step counts and tables are nobody's own."""
    weight = nn.Parameter(torch.zeros(10_000))
    for index, expected in enumerate(sliced(10_000, new)):
        found = Bucket([("w", weight)], new, index).recut(sliced(10_000, old))
        assert found.keys() == expected.keys() and found["step"] == 7
        assert all(torch.equal(found[key], expected[key]) for key in ("master", "absmax1", "qmap1"))


def test_parameters_stay_views_of_their_bucket():
    """Aligned, none lost, in their values; a copy of the model is a model of its own."""
    module = network(torch.bfloat16)
    before = copy.deepcopy(module)
    optimizer = MasterOptimizer(module.named_parameters())
    (bucket,) = optimizer.buckets
    assert moved(module, before).abs().max() == 0 and all(offset % ALIGN == 0 for offset in bucket.offsets)
    twin = copy.deepcopy(module)
    train(module, optimizer, 2, 1e-2)
    for p, view in zip(module.parameters(), bucket.views(bucket.weights), strict=True):
        assert p.data_ptr() == view.data_ptr() and torch.equal(p, view)
    assert moved(module, before).abs().max() > 0 and moved(twin, before).abs().max() == 0
    module.to(torch.float32)
    output(module, 0).backward()
    with pytest.raises(AssertionError, match="moved or converted"):
        optimizer.step(lr=1e-3)


# ---------------------------------------------------------------- rule 14: schedules


def rates(schedule, steps, warmup):
    return [learning_rate(i, peak=2.0, schedule=schedule, warmup_steps=warmup, total_steps=steps) for i in range(steps)]


@pytest.mark.parametrize("warmup", [0, 1, 3, 10])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rule_14_every_rate_is_above_zero_the_first_one_too(schedule, warmup):
    found = rates(schedule, 10, warmup)
    assert min(found) > 0 and max(found) <= 2.0
    assert 2.0 in found, "the peak is reached"
    assert found[:warmup] == sorted(found[:warmup])


def test_schedules_by_hand():
    assert rates("constant", 4, 0) == [2.0] * 4
    assert rates("constant", 5, 2) == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert rates("linear", 4, 0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates("linear", 6, 2) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    assert rates("cosine", 4, 0) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert learning_rate(9, peak=1.0, schedule="linear", warmup_steps=0, total_steps=4) == 0.0
    with pytest.raises(ValueError, match="'wsd'.*constant, cosine, linear"):
        learning_rate(0, peak=1.0, schedule="wsd", warmup_steps=0, total_steps=4)


def test_rule_14_oracle_lr_multiplier(vectors):
    """Upstream's factors are ours one step late: its step 0 trains nothing (mended here), after that it lags by one."""
    cases = [v for v in vectors if v["function"] == "algo.lr_multiplier"]
    assert len(cases) == 3
    for case in cases:
        warmup, steps = case["input"]["num_warmup_steps"], case["input"]["steps"]
        ours = [
            learning_rate(i, peak=1.0, schedule="constant", warmup_steps=warmup, total_steps=steps)
            for i in range(steps)
        ]
        assert case["expected"][0] == 0.0 < ours[0]
        lagging = case["expected"][1:]  # min(1, i / max(1, warmup)) from i = 1
        assert ours[: steps - 1] == pytest.approx(lagging, abs=1e-9)


@pytest.mark.gpu
def test_moments_from_host_memory_step_as_moments_on_the_gpu():
    """Bit for bit over several steps, through a checkpoint too, and with more parts than buffers."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    start = [torch.randn(1000, 300, device="cuda", dtype=torch.bfloat16) for _ in range(7)]
    states = []
    for offloaded in (False, True):
        params = [(str(i), torch.nn.Parameter(x.clone())) for i, x in enumerate(start)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "BUCKET", 1)  # every parameter in one of its own
            optimizer = MasterOptimizer(params, offload_moments=offloaded)
        for step in range(4):
            for i, (_, p) in enumerate(params):
                (p.float().square().sum() * (i + step + 1)).backward()
            optimizer.step(lr=1e-2)
            if step == 1:
                optimizer.load_state_dict([copy.deepcopy(optimizer.state_dict())])
        states.append([p.detach().clone() for _, p in params])
    assert all(torch.equal(a, b) for a, b in zip(*states))


@pytest.mark.gpu
def test_rule_07_eight_bit_moments_move_bf16_weights_as_fp32_ones():
    """A hundred steps of 1e-6; the slice is long enough that bitsandbytes really rounds the moments."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("bitsandbytes")
    found = {}
    for kind, dtype in (("adamw", torch.float32), ("adamw8bit", torch.bfloat16)):
        torch.manual_seed(0)
        layer = nn.Linear(256, 256, bias=False).cuda()
        layer.weight.data = (0.02 * torch.randn(256, 256, device="cuda")).bfloat16().to(dtype)
        start = layer.weight.detach().float().clone()
        optimizer = MasterOptimizer(layer.named_parameters(), kind=kind)
        for step in range(100):
            x = torch.randn(8, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            layer(x.to(dtype)).float().square().sum().backward()
            optimizer.step(lr=1e-6)
        found[kind] = masters(optimizer)[0] - start
        if kind == "adamw8bit":
            state = optimizer.inner[0].state[optimizer.buckets[0].master]
            assert state["state1"].dtype == torch.uint8
            again = MasterOptimizer(copy.deepcopy(layer).named_parameters(), kind=kind)
            again.load_state_dict([copy.deepcopy(optimizer.state_dict())])
            for twin in (optimizer, again):
                twin.params[0].grad = None
                (twin.params[0].float().square().sum()).backward()
                twin.step(lr=1e-3)
            assert torch.equal(optimizer.buckets[0].master, again.buckets[0].master), "resumed bit for bit"
    assert (found["adamw8bit"] - found["adamw"]).norm() < 0.2 * found["adamw"].norm()
