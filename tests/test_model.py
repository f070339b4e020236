"""model.py: positions, packing and the policy against transformers' own padded forward; loading and saving."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_group, make_prompt, new_policy, sharpen

import model as model_module
from model import (
    Policy,
    banned_ids,
    frozen_copy,
    load_model,
    mrope_positions,
    pack,
    pack_groups,
    plan_packs,
    save_hf,
    stop_ids,
    weights,
)
from rollout import Completion

TOLERANCE = 1e-5

# name -> (prompts by name in the `prompts` fixture, completion lengths of each)
CASES = {
    "text": (["text"], [(5, 9)]),
    "one picture": (["one"], [(7, 4)]),
    "several pictures": (["several"], [(6, 3)]),
    "mixed lengths": (["several", "text", "one"], [(3, 11), (9, 1), (2, 6)]),
    "G = 1": (["one", "text"], [(8,), (3,)]),
    "one-token completions": (["text", "several"], [(1, 1, 1), (1, 1, 1)]),
}


def gather_case(prompts, policy, name):
    names, lengths = CASES[name]
    groups = [make_group(policy, n, seed=i) for i, n in enumerate(lengths)]
    return [prompts[n] for n in names], groups


# ---------------------------------------------------------------- the plain padded computation, from transformers


def plain_model(policy):
    """transformers' own model with the same weights and its own attention."""
    plain = copy.deepcopy(policy.model)
    for part in (plain.config, plain.config.text_config, plain.config.vision_config):
        part._attn_implementation = "sdpa"
    return plain


def plain_logp(plain, banned, prompts, groups, *, temperature=1.0, token_types=True):
    """One padded row a completion, pictures repeated for each: log-probs and entropies in packed order, (M,) each."""
    rows, types, pixels, grids = [], [], [], []
    for prompt, group in zip(prompts, groups):
        for c in group:
            ids = torch.tensor(prompt.expanded + c.token_ids)
            rows.append(ids)
            types.append((ids == plain.config.image_token_id).long())
            if prompt.pixels is not None:
                pixels.append(prompt.pixels)
                grids.append(prompt.grid)
    pad = torch.nn.utils.rnn.pad_sequence
    attention = pad([torch.ones_like(ids) for ids in rows], batch_first=True)  # (N, L)
    logits = plain(
        input_ids=pad(rows, batch_first=True), attention_mask=attention,
        pixel_values=torch.cat(pixels) if pixels else None, image_grid_thw=torch.cat(grids) if grids else None,
        mm_token_type_ids=pad(types, batch_first=True) if token_types else None,
    ).logits  # (N, L, V)  # fmt: skip
    logp, entropy = [], []
    for i, (prompt, c) in enumerate((p, c) for p, group in zip(prompts, groups) for c in group):
        own = logits[i, len(prompt.expanded) - 1 : len(prompt.expanded) - 1 + len(c.token_ids)] / temperature  # (R, V)
        own = own[:, ~banned].log_softmax(-1)
        place = torch.cumsum(~banned, 0) - 1  # id -> column once the banned ones are gone
        logp.append(own.gather(1, place[torch.tensor(c.token_ids)][:, None]).squeeze(1))
        entropy.append(-(own.exp() * own).sum(-1))
    return torch.cat(logp), torch.cat(entropy)


def some_loss(logp, entropy):
    """A different weight on every number, so that no two errors cancel."""
    weight = torch.linspace(-1.0, 2.0, len(logp))
    return (weight * logp).sum() + (weight.flip(0) * entropy).sum()


def gradients(module, loss):
    """Of every parameter, by name; zeros where none arrived."""
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(module.named_parameters(), found)}


# ---------------------------------------------------------------- rule 2: positions


@pytest.mark.parametrize("name", ["text", "one", "several"])
def test_rule_02_positions_are_those_of_transformers(tiny, prompts, name):
    prompt = prompts[name]
    ids = torch.tensor([prompt.expanded])
    types = (ids == tiny.config.image_token_id).long()
    expected, _ = tiny.policy.model.model.get_rope_index(ids, types, image_grid_thw=prompt.grid)
    ours = mrope_positions(prompt.expanded, prompt.grid, tiny.config)
    assert ours.shape == (3, len(prompt.expanded))
    assert torch.equal(ours, expected[:, 0])
    assert (name == "text") == torch.equal(ours[0], ours[2])


def test_rule_02_positions_of_a_written_out_picture(tiny):
    """2 x 3 merged patches after two words: time stays, rows and columns spread, the count moves on by 3."""
    i = tiny.config.image_token_id
    ours = mrope_positions([9, 9, *[i] * 6, 9, 9], torch.tensor([[1, 4, 6]]), tiny.config)
    assert ours.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_rule_02_pictures_and_placeholders_must_match(tiny, prompts):
    grid = prompts["several"].grid
    with pytest.raises(AssertionError, match="more pictures than placeholders"):
        mrope_positions(prompts["several"].expanded, torch.cat([grid, grid]), tiny.config)


def test_rule_02_one_dimensional_positions_would_show(tiny, prompts):
    """The comparison below is worth something: flat positions, ours or transformers', are far away."""
    chosen, groups = gather_case(prompts, tiny.policy, "several pictures")
    packed = pack_groups(chosen, groups, tiny.config)
    flat = copy.copy(packed)
    flat.positions = packed.positions[:1].expand(3, -1).contiguous()
    logp = tiny.policy(packed)[0]
    assert (logp - tiny.policy(flat)[0]).abs().max() > 100 * TOLERANCE
    wrong, _ = plain_logp(plain_model(tiny.policy), tiny.policy.banned, chosen, groups, token_types=False)
    assert (logp - wrong).abs().max() > 100 * TOLERANCE


# ---------------------------------------------------------------- packed = padded


@pytest.mark.parametrize("name", CASES)
def test_rule_02_packed_equals_the_padded_computation_of_transformers(tiny, prompts, name):
    """Log-probs, entropies and the gradient of every parameter, in fp32."""
    chosen, groups = gather_case(prompts, tiny.policy, name)
    plain = plain_model(tiny.policy)
    expected = plain_logp(plain, tiny.policy.banned, chosen, groups)
    (packed,) = pack(chosen, groups, tiny.config, token_budget=10_000)
    ours = tiny.policy(packed)
    lengths = [sum(len(c.token_ids) for c in group) for group in groups]
    expected = [torch.cat([x.split(lengths)[i] for i in packed.index]) for x in expected]  # packing reorders groups
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)

    got, want = gradients(tiny.policy.model, some_loss(*ours)), gradients(plain, some_loss(*expected))
    assert got.keys() == want.keys()
    largest = max(float(g.abs().max()) for g in want.values())
    for name, g in want.items():
        scale = max(float(g.abs().max()), 1e-3 * largest)
        assert float((got[name] - g).abs().max()) <= TOLERANCE * scale, name
    seen = [name for name, g in want.items() if "visual" in name and g.abs().max() > 1e-4 * largest]
    assert bool(seen) == any(p.pixels is not None for p in chosen)


def test_packed_equals_padded_at_another_temperature(tiny, prompts):
    chosen, groups = gather_case(prompts, tiny.policy, "one picture")
    expected = plain_logp(plain_model(tiny.policy), tiny.policy.banned, chosen, groups, temperature=0.7)
    ours = tiny.policy(pack_groups(chosen, groups, tiny.config), temperature=0.7)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_packing_several_groups_together_changes_nothing(tiny, prompts):
    chosen, groups = gather_case(prompts, tiny.policy, "mixed lengths")
    together = pack_groups(chosen, groups, tiny.config)
    alone = [tiny.policy(pack_groups([p], [g], tiny.config))[0] for p, g in zip(chosen, groups)]
    torch.testing.assert_close(tiny.policy(together)[0], torch.cat(alone), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_completion_does_not_see_its_siblings(tiny, prompts):
    group = make_group(tiny.policy, (6, 5, 4))
    changed = [group[0], make_group(tiny.policy, (9,), seed=5)[0], group[2]]
    before = tiny.policy(pack_groups([prompts["one"]], [group], tiny.config))[0].split([6, 5, 4])
    after = tiny.policy(pack_groups([prompts["one"]], [changed], tiny.config))[0].split([6, 9, 4])
    torch.testing.assert_close(before[0], after[0], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(before[2], after[2], rtol=TOLERANCE, atol=TOLERANCE)


def test_pack_writes_a_group_as_documented(tiny):
    prompt = make_prompt(tiny.processor, "x")
    prompt.expanded[:] = [11, 12]
    group = make_group(tiny.policy, (2, 1))
    group[0].token_ids, group[1].token_ids = [13, 14], [15]
    group[0].logprobs, group[1].logprobs = [-0.5, -1.5], [-2.5]
    group[1].finished = False
    packed = pack_groups([prompt], [group], tiny.config, advantages=torch.tensor([[1.0, -2.0]]), mask_truncated=True)
    assert packed.ids.tolist() == [11, 12, 13, 14, 15]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2]] * 3
    assert packed.rows.tolist() == [1, 2, 1]
    assert packed.targets.tolist() == [13, 14, 15]
    assert packed.sequence.tolist() == [0, 0, 1] and packed.lengths.tolist() == [2, 1]
    assert packed.advantages.tolist() == [1.0, 1.0, -2.0]
    assert packed.rollout_logp.tolist() == [-0.5, -1.5, -2.5]
    assert packed.loss_mask.tolist() == [1.0, 1.0, 0.0]
    assert pack_groups([prompt], [group], tiny.config).loss_mask.tolist() == [1.0, 1.0, 1.0]


def test_packs_keep_the_budget_and_lose_no_group():
    generator = torch.Generator().manual_seed(0)
    for budget in (1, 50, 300, 10_000):
        sizes = torch.randint(1, 120, (60,), generator=generator).tolist()
        packs = plan_packs(sizes, budget)
        assert sorted(i for chosen in packs for i in chosen) == list(range(60))
        for chosen in packs:
            assert sum(sizes[i] for i in chosen) <= budget or len(chosen) == 1
        if budget == 10_000:
            assert len(packs) == 1


def test_pack_gives_every_group_its_own_advantages(tiny, prompts):
    chosen, groups = gather_case(prompts, tiny.policy, "mixed lengths")
    advantages = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    for packed in pack(chosen, groups, tiny.config, token_budget=40, advantages=advantages):
        per_group = packed.advantages.split([sum(len(c.token_ids) for c in groups[i]) for i in packed.index])
        for i, own in zip(packed.index, per_group):
            expected = [a for a, c in zip(advantages[i].tolist(), groups[i]) for _ in c.token_ids]
            assert own.tolist() == expected


# ---------------------------------------------------------------- rule 3: banned ids


def test_rule_03_the_mask_holds_specials_and_rows_without_a_token(tiny):
    tokenizer, banned = tiny.processor.tokenizer, tiny.policy.banned
    assert banned.shape == (tiny.config.text_config.vocab_size,)
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    expected = {tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names} - {None}
    expected |= set(range(len(tokenizer), len(banned)))
    assert len(expected) > 5 and set(banned.nonzero().squeeze(-1).tolist()) == expected
    assert not banned[list(stop_ids(tiny.processor))].any()
    assert banned_ids(tiny.processor, tiny.policy.model, extra=(7,))[7] and not banned[7]


def test_rule_03_banned_ids_carry_no_probability(own, prompts):
    """Their weights change nothing: neither log-probs nor entropy, and no gradient reaches their rows of the head."""
    untied = copy.deepcopy(own.policy)
    untied.model.lm_head.weight = torch.nn.Parameter(own.policy.model.lm_head.weight.detach().clone())
    packed = pack_groups([prompts["one"]], [make_group(own.policy, (6, 4))], own.config)
    before = untied(packed)
    gradient = torch.autograd.grad(some_loss(*before), untied.model.lm_head.weight)[0]
    assert gradient[untied.banned].abs().max() == 0 and gradient[~untied.banned].abs().max() > 0
    with torch.no_grad():
        untied.model.lm_head.weight[untied.banned] *= 30
    for a, b in zip(before, untied(packed)):
        assert torch.equal(a, b)


def test_rule_03_a_banned_target_is_an_error(tiny, prompts):
    group = make_group(tiny.policy, (3,))
    group[0].token_ids[1] = int(tiny.policy.banned.nonzero()[0])
    with pytest.raises(ValueError, match="banned"):
        tiny.policy(pack_groups([prompts["text"]], [group], tiny.config))


# ---------------------------------------------------------------- rule 16: every rank the same graph; freezing


def test_rule_16_text_alone_gives_every_vision_parameter_a_zero_gradient(own, prompts):
    packed = pack_groups([prompts["text"]], [make_group(own.policy, (4, 2))], own.config)
    some_loss(*own.policy(packed)).backward()
    for name, p in own.policy.vision.named_parameters():
        assert p.grad is not None and p.grad.abs().max() == 0, name
    assert own.policy.language.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_rule_16_the_blank_picture_does_not_change_the_numbers(own, prompts):
    packed = pack_groups([prompts["text"]], [make_group(own.policy, (4, 2))], own.config)
    with_tower = own.policy(packed)[0]
    with torch.no_grad():
        assert torch.equal(with_tower, own.policy(packed)[0])


def test_a_frozen_tower_gets_no_gradient_and_costs_no_graph(own, prompts):
    own.policy.freeze_vision()
    for name in ("one", "text"):
        packed = pack_groups([prompts[name]], [make_group(own.policy, (4, 2))], own.config)
        some_loss(*own.policy(packed)).backward()
    assert all(p.grad is None for p in own.policy.vision.parameters())
    assert own.policy.picture_features(prompts["one"].pixels, prompts["one"].grid).grad_fn is None
    assert own.policy.language.embed_tokens.weight.grad is not None


def test_the_reference_stays_as_it_was(own, prompts):
    packed = pack_groups([prompts["one"]], [make_group(own.policy, (4, 2))], own.config)
    reference = frozen_copy(own.policy)
    before = own.policy(packed)[0].detach()
    with torch.no_grad():
        for p in own.policy.parameters():
            p.mul_(1.1)
    assert torch.equal(reference(packed)[0], before)
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference(packed)[0].requires_grad


# ---------------------------------------------------------------- rule 8: numbers in fp32


def test_rule_08_a_bf16_policy_keeps_log_probs_in_fp32(tiny, prompts):
    """The head of a bf16 model must not round its logits: against fp64 from the same hidden states."""
    policy = Policy(copy.deepcopy(tiny.policy.model).bfloat16(), tiny.policy.banned)
    packed = pack_groups([prompts["one"]], [make_group(policy, (20, 20))], tiny.config)
    kept = {}
    hook = policy.language.register_forward_hook(lambda module, args, out: kept.update(hidden=out.last_hidden_state[0]))
    logp, entropy = policy(packed)
    hook.remove()
    logits = (kept["hidden"][packed.rows].double() @ policy.model.lm_head.weight.double().T)[:, ~policy.banned]
    place = torch.cumsum(~policy.banned, 0) - 1
    exact = logits.log_softmax(-1)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(
        logp.double(), exact.gather(1, place[packed.targets][:, None]).squeeze(1), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- activation checkpointing


def bytes_kept(policy, packed) -> int:
    """Size of what the forward pass keeps for the backward pass."""
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        policy(packed)
    return total


def test_checkpointing_keeps_less_and_computes_the_same(own, prompts):
    packed = pack_groups([prompts["one"]], [make_group(own.policy, (9, 5))], own.config)
    plain, kept = gradients(own.policy, some_loss(*own.policy(packed))), bytes_kept(own.policy, packed)
    own.policy.checkpoint_layers(2)
    again = gradients(own.policy, some_loss(*own.policy(packed)))
    for name, g in plain.items():
        torch.testing.assert_close(again[name], g, rtol=1e-5, atol=1e-6)
    assert bytes_kept(own.policy, packed) < 0.7 * kept


# ---------------------------------------------------------------- loading and saving


@pytest.fixture(scope="module", params=["tied", "untied"])
def saved(request, tmp_path_factory):
    """A saved policy and the policy: with the head tied to the embeddings (3B) and with its own (7B)."""
    shapes = copy.deepcopy(model_module.SHAPES)
    shapes["tiny"]["tied"] = request.param == "tied"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "SHAPES", shapes)
        model, processor = load_model("random:tiny")
    policy = Policy(sharpen(model, 3), banned_ids(processor, model))
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    save_hf(policy, processor, folder)
    return policy, folder, request.param


def rounded(policy):
    """The policy with its weights rounded to bf16, computing in fp32."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.bfloat16().float())
    return other


def test_a_checkpoint_loads_with_from_pretrained_and_gives_the_same_logits(saved, prompts):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    policy, folder, _ = saved
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16, "config.json must say what the weights are"
    processor = AutoProcessor.from_pretrained(folder)
    prompt = prompts["one"]
    ids = torch.tensor([prompt.expanded])
    inputs = dict(input_ids=ids, pixel_values=prompt.pixels, image_grid_thw=prompt.grid,
                  mm_token_type_ids=(ids == loaded.config.image_token_id).long())  # fmt: skip
    with torch.no_grad():
        expected = plain_model(rounded(policy))(**inputs).logits
        torch.testing.assert_close(loaded.float()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert processor.tokenizer("red square")["input_ids"]


def test_our_own_loader_takes_the_checkpoint_back(saved, prompts):
    policy, folder, kind = saved
    model, processor = load_model(str(folder))
    again = Policy(model, banned_ids(processor, model))
    packed = pack_groups([prompts["one"]], [make_group(policy, (5, 3))], policy.config)
    torch.testing.assert_close(again(packed)[0], rounded(policy)(packed)[0], rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings == (kind == "tied")


def test_a_checkpoint_has_the_names_of_the_published_ones(saved):
    """weights() yields the names of transformers 5's modules; vLLM takes both, files keep what was published."""
    from safetensors import safe_open

    policy, folder, kind = saved
    pairs = list(weights(policy))
    names = {name for name, _ in pairs}
    assert len(names) == len(pairs) and all(tensor.dtype == torch.bfloat16 for _, tensor in pairs)
    assert names == {name for name, _ in policy.model.named_parameters()}
    assert ("lm_head.weight" in names) == (kind == "untied")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        on_disk = set(file.keys())
    published = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for name in names}
    assert on_disk == published


def test_random_models_are_reproducible_and_seeded():
    a, b, c = (dict(load_model("random:tiny", seed=s)[0].named_parameters()) for s in (1, 1, 2))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a[name], c[name])


@pytest.mark.parametrize("shape, parameters", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_named_shapes_are_the_published_ones(shape, parameters):
    model, _ = load_model(f"random:{shape}", device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("source", ["random:nine", "/no/such/folder", "{tmp}/empty", "{tmp}/text", "{tmp}/torn"])
def test_a_model_that_is_none_gets_one_line(tmp_path, source, tiny):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    (tmp_path / "torn").mkdir()
    tiny.config.save_pretrained(tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    source = source.replace("{tmp}", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        load_model(source)
    message = str(caught.value)
    assert "\n" not in message and source in message and len(message) < 400, message


def test_a_checkpoint_with_holes_is_refused(tmp_path, own):
    """transformers fills missing weights with noise and only prints a table; a run on them would be worthless."""
    from safetensors.torch import load_file, save_file

    save_hf(own.policy, own.processor, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "layers.1.mlp" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="layers.1.mlp") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_shape_is_refused(monkeypatch):
    shapes = copy.deepcopy(model_module.SHAPES)
    shapes["tiny"]["vocab_size"] = 100
    monkeypatch.setattr(model_module, "SHAPES", shapes)
    with pytest.raises(ValueError, match="100 vocabulary rows"):
        load_model("random:tiny")


def test_two_policies_of_one_seed_are_the_same_policy(tiny):
    """Other processes rebuild the policy of these tests from its seed."""
    again, _ = new_policy()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tiny.policy.parameters()))


# ---------------------------------------------------------------- faster forms of the same modules


def test_a_completion_without_tokens_takes_no_row_and_changes_nothing():
    policy, processor = new_policy(seed=4)
    prompt = make_prompt(processor, "where", [(56, 84)])
    full, group = make_group(policy, (6, 4)), make_group(policy, (6, 4))
    group.insert(1, Completion([], [], "", True))
    packed = pack_groups([prompt], [group], policy.config)
    assert packed.lengths.tolist() == [6, 0, 4] and len(packed.rows) == len(packed.targets) == 10
    torch.testing.assert_close(policy(packed)[0], policy(pack_groups([prompt], [full], policy.config))[0])


def test_patch_embedding_as_a_product_is_the_convolution_and_a_copy_has_its_own_weights():
    model, _ = load_model("random:tiny", seed=3)
    embed = model.model.visual.patch_embed
    pixels = torch.randn(5, embed.proj.weight[0].numel())
    expected = type(embed).forward(embed, pixels)
    torch.testing.assert_close(embed(pixels), expected, rtol=1e-5, atol=1e-5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.visual.patch_embed.proj.weight.zero_()
    assert other.model.visual.patch_embed(pixels).abs().max() == 0
    torch.testing.assert_close(embed(pixels), expected, rtol=1e-5, atol=1e-5)


def test_zero_columns_change_neither_output_nor_gradients_of_the_vision_mlp():
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

    plain = Qwen2_5_VLMLP(SimpleNamespace(hidden_size=6, intermediate_size=13, hidden_act="silu"), bias=True).double()
    aligned = copy.deepcopy(plain)
    model_module.align_mlp(aligned)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert aligned.forward.__func__ is not type(plain).forward
    torch.testing.assert_close(aligned(x), plain(x))
    for mlp in (plain, aligned):
        mlp(x).square().sum().backward()
    for a, b in zip(aligned.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---------------------------------------------------------------- low-rank corrections


def test_lora_trains_little_starts_at_nothing_and_is_handed_out_as_sums():
    policy, processor = new_policy(seed=4)
    prompt = make_prompt(processor, "where", [(56, 84)])
    packed = pack_groups([prompt], [make_group(policy, (6, 4))], policy.config)
    before, whole = policy(packed)[0].detach(), dict(weights(policy, dtype=None))
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    model_module.add_lora(policy, 4)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and "visual" not in name for name in trained)
    torch.testing.assert_close(policy(packed)[0].detach(), before)
    policy(packed)[0].sum().backward()
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name in trained:
                p.add_(torch.randn(p.shape) * 0.1)
    handed = dict(weights(policy, dtype=None))
    assert handed.keys() == whole.keys()
    moved = {name for name in whole if not torch.equal(handed[name], whole[name])}
    assert moved == set(dict(weights(policy, dtype=None, trained=True))) and all("_proj.weight" in name for name in moved)
    plain, _ = new_policy(seed=4)
    plain.model.load_state_dict({**handed, "lm_head.weight": handed["model.language_model.embed_tokens.weight"]})
    torch.testing.assert_close(plain(packed)[0], policy(packed)[0], rtol=1e-4, atol=1e-4)
