"""GPU memory of a training step: what each phase holds, and how much of the backward pass must be recomputed to fit.

Bytes of weights and optimiser follow from shapes. Activations are counted from what autograd keeps of one layer and one
token (docs/performance.md compares the count with measurements).
"""

import torch

import ranks
from kernels.logprob import CHUNK_BYTES

GIB = 2**30
SLACK = 3 * GIB  # fragments of the allocator, workspaces, picture features, the graph's small tensors


def layer_bytes(config) -> int:
    """What one language layer keeps of one token for its backward pass, bf16, with Liger's norms and SwiGLU: the two inputs
    of the norms, their outputs, query and attention output, key and value, gate, up and their product."""
    key_value = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return 2 * (6 * config.hidden_size + 2 * key_value + 3 * config.intermediate_size)


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
    sizes = [(len(p.ids), 0 if p.pixels is None else len(p.pixels)) for p in packs]
    fits = (n for n in range(depth) if all(activations(policy, *size, n) <= free for size in sizes))
    return max(ranks.gather(next(fits, depth)))


def estimate(cfg, policy, engine: float) -> dict[str, dict[str, float]]:
    """GiB by phase and cause of one rank, for train_grpo.py --dry-run; engine: GiB the awake engine fills, 0 without."""
    text, width = policy.config.text_config, next(policy.model.parameters()).element_size()
    everything = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    held = {
        "weights": everything * width / GIB,
        "masters": trained * (4 if width < 4 else 0) / GIB,
        "moments": 0.0 if cfg.offload_moments else trained * 8 / GIB,
        "reference": everything * width / GIB if cfg.kl != "none" and cfg.kl_coef > 0 else 0.0,
    }
    if engine:
        sampling = {"engine": engine}
    else:
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * width
        sampling = {"key-value cache": cfg.rollout_sequences * (cfg.max_prompt_tokens + cfg.max_completion_tokens) * cache / GIB}
    kept = activations(policy, cfg.token_budget, 0, cfg.checkpoint_layers or 0)
    return {
        "generate": {**held, **sampling},
        "update": {**held, "gradients": trained * 4 / GIB, "activations": kept / GIB,
                   "head": head_bytes(text) / GIB},
        "save": {**held, "copy on the host": everything * 2 / GIB},
    }
