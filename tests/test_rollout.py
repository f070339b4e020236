"""rollout.py: HFRollout against full forward passes, and against the trainer's log-probs."""

import copy

import pytest
import torch
from conftest import make_prompt

import rollout as rollout_module
from model import pack_groups, stop_ids, weights
from rollout import HFRollout, sample

TOLERANCE = 1e-5


def generate(tiny, prompts, **kwargs):
    kwargs = dict(n=2, max_tokens=10, temperature=1.0, seed=0) | kwargs
    engine = HFRollout(tiny.policy, tiny.processor, max_sequences=kwargs.pop("max_sequences", 256))
    return engine.generate(prompts, **kwargs)


def trainer_gap(policy, prompts, groups, temperature) -> float:
    """Largest difference between the engine's log-probs and the trainer's, over all tokens."""
    packed = pack_groups(prompts, groups, policy.config)
    with torch.no_grad():
        return float((policy(packed, temperature=temperature)[0] - packed.rollout_logp).abs().max())


def next_logits_by_full_forward(policy, prompt, token_ids):
    """transformers' own forward over prompt and completion: logits of the next token, banned ids out. (V,)"""
    plain = copy.deepcopy(policy.model)
    for part in (plain.config, plain.config.text_config, plain.config.vision_config):
        part._attn_implementation = "sdpa"
    ids = torch.tensor([prompt.expanded + token_ids])
    with torch.no_grad():
        out = plain(input_ids=ids, pixel_values=prompt.pixels, image_grid_thw=prompt.grid,
                    mm_token_type_ids=(ids == plain.config.image_token_id).long())  # fmt: skip
    return out.logits[0, -1].masked_fill(policy.banned, float("-inf"))


def unpredictable(policy, seed: int = 9, *, ends: bool = True) -> None:
    """Large embeddings and a head of its own: what comes next hangs on the last word, and no word repeats for ever.

    The head's row of the end token is three times as large, so that it ends completions here and there, or zero."""
    head = torch.randn(policy.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    head[policy.model.config.text_config.eos_token_id] *= 3 if ends else 0
    policy.model.lm_head.weight = torch.nn.Parameter(head)
    with torch.no_grad():
        policy.language.embed_tokens.weight *= 5


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("name", ["text", "one", "several"])
def test_greedy_is_the_argmax_of_full_forward_passes(own, prompts, name):
    unpredictable(own.policy, ends=False)
    ((completion,),) = generate(own, [prompts[name]], n=1, max_tokens=8, temperature=0)
    assert len(set(completion.token_ids)) >= 3, "a model that repeats itself tests little"
    for t, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs)):
        logits = next_logits_by_full_forward(own.policy, prompts[name], completion.token_ids[:t])
        assert token == int(logits.argmax())
        assert abs(logprob - float(logits.log_softmax(-1)[token])) < TOLERANCE


def test_the_batch_a_prompt_is_in_does_not_matter(own, prompts):
    """Left padding: alone, or beside longer prompts with pictures."""
    unpredictable(own.policy, ends=False)
    together = generate(own, list(prompts.values()), n=1, temperature=0)
    for prompt, (beside,) in zip(prompts.values(), together):
        ((alone,),) = generate(own, [prompt], n=1, temperature=0)
        assert alone.token_ids == beside.token_ids
        assert max(abs(a - b) for a, b in zip(alone.logprobs, beside.logprobs)) < TOLERANCE


def test_max_sequences_splits_the_batch_and_keeps_the_order(own, prompts):
    unpredictable(own.policy, ends=False)
    names = ["one", "text", "several", "text", "one"]
    whole = generate(own, [prompts[n] for n in names], n=2, temperature=0)
    split = generate(own, [prompts[n] for n in names], n=2, temperature=0, max_sequences=2)
    assert [[c.token_ids for c in g] for g in whole] == [[c.token_ids for c in g] for g in split]
    assert whole[0][0].token_ids == whole[4][1].token_ids != whole[1][0].token_ids


# ---------------------------------------------------------------- sampling


def test_rule_15_one_seed_one_result_another_seed_another(tiny, prompts):
    chosen = [prompts["one"], prompts["text"]]
    a, b, c = (generate(tiny, chosen, n=3, seed=s) for s in (5, 5, 6))
    assert a == b
    assert [x.token_ids for g in a for x in g] != [x.token_ids for g in c for x in g]


def test_sampling_does_not_touch_the_global_generator(tiny, prompts):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    generate(tiny, [prompts["text"]])
    assert torch.equal(torch.rand(4), expected)


def test_completions_of_a_group_differ(tiny, prompts):
    (group,) = generate(tiny, [prompts["one"]], n=6)
    assert len({tuple(c.token_ids) for c in group}) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_have_the_frequencies_of_their_probabilities(temperature):
    logits = torch.tensor([[1.0, 2.0, 0.0, float("-inf")]])
    tokens, logp = sample(logits.expand(20_000, -1), temperature, torch.Generator().manual_seed(0))
    expected = (logits[0] / temperature).softmax(-1)
    found = tokens.bincount(minlength=4) / 20_000
    assert (found - expected).abs().max() < 0.015
    torch.testing.assert_close(logp, expected.log()[tokens])
    assert sample(logits, 0, torch.Generator())[0].tolist() == [1]
    assert sample(logits, 0, torch.Generator())[1].item() == pytest.approx(float(logits[0].log_softmax(-1)[1]))


def test_top_p_leaves_the_likeliest_tokens_and_their_proportions():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]]).log()
    for top_p, kept in ((0.96, 4), (0.94, 3), (0.79, 2), (0.4, 1), (1.0, 4)):
        tokens, logp = sample(logits.expand(4000, -1), 1.0, torch.Generator().manual_seed(0), top_p)
        expected = logits[0, :kept].exp() / logits[0, :kept].exp().sum()
        assert sorted(set(tokens.tolist())) == list(range(kept))
        torch.testing.assert_close(logp, expected.log()[tokens])
        assert (tokens.bincount(minlength=kept) / 4000 - expected).abs().max() < 0.03
    assert sample(logits, 0, torch.Generator(), 0.4)[1].item() == pytest.approx(float(logits[0, 0])), "greedy is never cut"


# ---------------------------------------------------------------- rules 3 and 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rule_04_engine_and_trainer_agree_on_every_log_prob(tiny, prompts, temperature):
    chosen = list(prompts.values())
    groups = generate(tiny, chosen, n=4, temperature=temperature)
    assert trainer_gap(tiny.policy, chosen, groups, temperature) < TOLERANCE
    assert trainer_gap(tiny.policy, chosen, groups, temperature=1.7 - temperature) > 100 * TOLERANCE  # the other one


def test_rule_04_greedy_log_probs_are_those_at_temperature_1(tiny, prompts):
    groups = generate(tiny, [prompts["one"]], n=1, temperature=0)
    assert trainer_gap(tiny.policy, [prompts["one"]], groups, 1.0) < TOLERANCE


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_rule_03_banned_ids_are_never_sampled_and_both_sides_normalise_over_the_rest(own, prompts, temperature):
    """The head of every banned id is made to win by far; the engine must not see it, nor the trainer."""
    unpredictable(own.policy)
    chosen = [prompts["one"], prompts["text"]]
    with torch.no_grad():
        own.policy.model.lm_head.weight[own.policy.banned] *= 100
        hidden = torch.randn(50, own.config.text_config.hidden_size)
        winners = (hidden @ own.policy.model.lm_head.weight.T).argmax(-1)
    assert own.policy.banned[winners].float().mean() > 0.9, "the banned ids should win here"
    groups = generate(own, chosen, n=4, temperature=temperature)
    for c in (c for group in groups for c in group):
        assert not own.policy.banned[torch.tensor(c.token_ids)].any()
        assert min(c.logprobs) > -50
    assert trainer_gap(own.policy, chosen, groups, temperature or 1.0) < TOLERANCE


# ---------------------------------------------------------------- where a completion ends


def test_a_completion_ends_with_its_stop_token_and_no_later(tiny, prompts):
    groups = generate(tiny, list(prompts.values()), n=16, max_tokens=64)
    completions = [c for g in groups for c in g]
    stop = set(stop_ids(tiny.processor))
    assert len(stop) == 2
    for c in completions:
        assert len(c.token_ids) == len(c.logprobs) <= 64
        assert not stop & set(c.token_ids[:-1])
        assert c.finished == (c.token_ids[-1] in stop)
        assert c.finished or len(c.token_ids) == 64


def scripted(policy, script):
    """The policy says exactly this: script[row][t] for each row of the first batch, whatever it is asked.

    Rows that finish leave the batch; which row is which is carried along through the cache."""
    step = {"t": -1}
    vocabulary = len(policy.banned)

    def next_logits(embeds, positions, mask, cache):
        if step["t"] < 0:
            cache.layers[0] = [torch.arange(len(embeds))]
        rows = cache.layers[0][0]
        step["t"] += 1
        logits = torch.zeros(len(rows), vocabulary)
        for i, row in enumerate(rows.tolist()):
            logits[i, script[row][step["t"]]] = 50.0
        return logits

    policy.next_logits = next_logits


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_oracle_response_mask_is_where_generation_stops(own, prompts, vectors, eos, monkeypatch):
    """Upstream masks what follows the first end token; here nothing follows it."""
    monkeypatch.setattr(rollout_module, "COMPACT", 0.75)
    cases = [v for v in vectors if v["function"] == "algo.response_mask"]
    assert len(cases) == 2
    end = own.processor.tokenizer.convert_tokens_to_ids(eos)
    for case in cases:
        ends = case["input"]["eos_token_id"]
        ends = ends if isinstance(ends, list) else [ends]
        words = [[end if i in ends else 100 + i for i in row] for row in case["input"]["response_ids"]]
        scripted(own.policy, words)
        groups = generate(own, [prompts["text"]] * len(words), n=1, max_tokens=len(words[0]), temperature=0)
        for (c,), row, mask in zip(groups, words, case["expected"]):
            assert [1] * len(c.token_ids) + [0] * (len(row) - len(c.token_ids)) == mask
            assert c.token_ids == row[: sum(mask)] and c.finished == (end in row)


def test_max_tokens_cuts_and_says_so(own, prompts):
    end = own.processor.tokenizer.eos_token_id
    scripted(own.policy, [[100, 101, 102], [100, 101, end], [end, 1, 1]])
    groups = generate(own, [prompts["text"]] * 3, n=1, max_tokens=3, temperature=0)
    assert [(c.token_ids, c.finished) for (c,) in groups] == [
        ([100, 101, 102], False), ([100, 101, end], True), ([end], True),
    ]  # fmt: skip
    own.policy.__dict__.pop("next_logits")
    ((one,),) = generate(own, [prompts["text"]], n=1, max_tokens=1, temperature=0)
    assert len(one.token_ids) == len(one.logprobs) == 1


def test_text_leaves_special_tokens_out(own, prompts):
    tokenizer = own.processor.tokenizer
    said = tokenizer("the red square (A)", add_special_tokens=False)["input_ids"]
    scripted(own.policy, [said + [tokenizer.eos_token_id]])
    ((c,),) = generate(own, [prompts["text"]], n=1, max_tokens=len(said) + 1, temperature=0)
    assert c.text == "the red square (A)" and c.token_ids[-1] == tokenizer.eos_token_id


# ---------------------------------------------------------------- finished rows leave the batch


def batches_seen(policy):
    """Batch size of every decoding step to come."""
    sizes, inner = [], policy.next_logits

    def next_logits(embeds, *args):
        sizes.append(len(embeds))
        return inner(embeds, *args)

    policy.next_logits = next_logits
    return sizes


def test_finished_rows_leave_the_batch_and_nothing_else_changes(own, monkeypatch):
    """Greedy, so that the text cannot depend on how many rows the generator draws for."""
    unpredictable(own.policy)
    words = ["red", "green square", "how many", "is it left of", "above", "count the circles in it", "where", "(A) yes"]
    chosen = [
        make_prompt(own.processor, text, [(56, 28 * (1 + i % 3))] * (i % 2), seed=i) for i, text in enumerate(words * 2)
    ]
    sizes, found = batches_seen(own.policy), {}
    for compact in (0.0, 0.75, 1.0):  # never, as shipped, at every ending
        monkeypatch.setattr(rollout_module, "COMPACT", compact)
        sizes.clear()
        found[compact] = [c for (c,) in generate(own, chosen, n=1, max_tokens=40, temperature=0)]
        assert sizes[1] == len(chosen) and (sizes[-1] == len(chosen)) == (compact == 0.0), sizes
    assert len({len(c.token_ids) for c in found[0.0]}) > 4
    for compact in (0.75, 1.0):
        for a, b in zip(found[0.0], found[compact]):
            assert a.token_ids == b.token_ids and a.finished == b.finished and a.text == b.text
            assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs)) < TOLERANCE


def test_compacted_rows_still_agree_with_the_trainer(own, prompts, monkeypatch):
    """Whole rollouts in which rows end and leave, against the packed forward pass (rule 4 with endings)."""
    unpredictable(own.policy)
    monkeypatch.setattr(rollout_module, "COMPACT", 1.0)
    chosen, sizes = list(prompts.values()), batches_seen(own.policy)
    groups = generate(own, chosen, n=16, max_tokens=48, temperature=1.0)
    assert len(set(sizes)) > 3, f"no row left the batch: {sizes}"
    assert trainer_gap(own.policy, chosen, groups, 1.0) < TOLERANCE


# ---------------------------------------------------------------- weights and modes


def test_wake_uses_the_policy_as_it_is_now(own, prompts):
    engine = HFRollout(own.policy, own.processor)
    kwargs = dict(n=2, max_tokens=6, temperature=1.0, seed=0)
    engine.wake(weights(own.policy))
    before = engine.generate([prompts["one"]], **kwargs)
    engine.sleep()
    with torch.no_grad():
        for p in own.policy.vision.parameters():
            p.mul_(1.3)
    engine.wake(weights(own.policy))
    after = engine.generate([prompts["one"]], **kwargs)
    assert before != after
    assert trainer_gap(own.policy, [prompts["one"]], after, 1.0) < TOLERANCE


@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing_does_not_take_the_cache_away(own, prompts, training):
    """transformers drops the cache in training mode with checkpointing on: the rollout must not depend on it."""
    expected = generate(own, [prompts["one"], prompts["text"]])
    own.policy.checkpoint_layers(2)
    own.policy.train(training)
    assert generate(own, [prompts["one"], prompts["text"]]) == expected


def test_generating_keeps_no_graph(own):
    prompt = make_prompt(own.processor, "x", [(56, 56)])
    generate(own, [prompt])
    assert all(p.grad is None for p in own.policy.parameters())
