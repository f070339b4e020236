"""train_grpo.py --dry-run: what a run would see and hold, without running it."""

import torch

from model import Policy
from rollout import choose_rollout


def uses_reference(cfg) -> bool:
    return cfg.kl != "none" and cfg.kl_coef > 0


def show(cfg, policy: Policy, processor, prompts: list, rows: int, world: int) -> None:
    """Prints a rendered prompt, prompt lengths, passes over the data, memory by phase; cfg is train_grpo.Config."""
    lengths = sorted(len(p.expanded) for p in prompts)
    print(f"\nfirst prompt ({len(prompts[0].expanded)} tokens, one placeholder a picture shown):")
    print(processor.tokenizer.decode(prompts[0].ids))
    print(f"\nprompt tokens of {len(lengths)} rows: least {lengths[0]}, median {lengths[len(lengths) // 2]}, most {lengths[-1]}")
    print(f"steps: {cfg.steps} x {cfg.prompts_per_step} prompts = {cfg.steps * cfg.prompts_per_step / rows:.1f} passes "
          f"over {rows} rows, {cfg.steps * cfg.mini_batches} optimiser steps on {world} ranks")  # fmt: skip
    print("\nmemory of one rank, estimated, GiB:")
    for phase, parts in memory_estimate(cfg, policy).items():
        print(f"  {phase:9s} {sum(parts.values()):7.2f}   " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v > 0.005))


def memory_estimate(cfg, policy: Policy) -> dict[str, dict[str, float]]:
    """GiB by phase and cause, from shapes: weights and optimiser exactly, activations to about a third."""
    gib = 2.0**-30
    text, width = policy.config.text_config, next(policy.model.parameters()).element_size()
    everything = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    held = {
        "weights": everything * width * gib,
        "masters": trained * (4 if width < 4 else 0) * gib,
        "moments": trained * 8 * gib,
        "reference": everything * width * gib if uses_reference(cfg) else 0.0,
    }
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * width
    a_token = text.hidden_size * (2 if cfg.checkpointing else 20) + text.intermediate_size * (0 if cfg.checkpointing else 4)
    activations = cfg.token_budget * text.num_hidden_layers * a_token * width
    logits = min(cfg.token_budget, 2048) * text.vocab_size * 12  # one chunk: logits, softmax, gradient in fp32
    if choose_rollout(cfg.rollout, policy.device) == "vllm" and policy.device.type == "cuda":
        engine = {"engine": cfg.engine_memory * torch.cuda.get_device_properties(policy.device).total_memory * gib}
    else:
        engine = {"key-value cache": cfg.rollout_sequences * (cfg.max_prompt_tokens + cfg.max_completion_tokens) * cache * gib}
    return {
        "generate": {**held, **engine},
        "update": {**held, "gradients": trained * 4 * gib, "activations": activations * gib, "logits": logits * gib},
        "save": {**held, "copy on the host": everything * 2 * gib},
    }
