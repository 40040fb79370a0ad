"""Sampling from a language model, with a cache or the whole context at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hc_compile.models.cache import KVCache


def sample_next(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: [B, V], floating.
        temperature: ≥ 0; 0 takes the largest logit.
        top_k: keep the k largest logits, None keeps all.
        generator: on the logits' device.
    Returns: [B, 1] int64.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    steps: int,
    *,
    max_seq_len: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """Extend `tokens` by `steps` sampled tokens.

    Args:
        model: tokens [B, S] -> logits [B, S, V]; with a cache, called as model(new, cache=cache).
        tokens: prompt [B, S] int64, S ≥ 1.
        steps: number of new tokens, ≥ 0.
        max_seq_len: the model sees at most this many of the latest tokens.
        temperature: ≥ 0; 0 is greedy.
        top_k: sample among the k most likely tokens.
        seed: makes the draw repeatable; None uses torch's global generator.
        cache: empty; each step then sees only the new tokens. Prompt and steps must fit in it.
    Returns: [B, S + steps] int64.
    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be [B, S] with S >= 1, got {list(tokens.shape)}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
    generator = None
    if seed is not None:
        generator = torch.Generator(device=tokens.device).manual_seed(seed)
    if cache is not None and not tokens.shape[1] + steps <= cache.max_seq_len:
        raise ValueError(
            f"cache must hold S + steps = {tokens.shape[1] + steps}, got {cache.max_seq_len}"
        )
    new = tokens.clone()
    if new.shape[1] > 1:  # a compiled model then has one graph for all prompts
        torch._dynamo.maybe_mark_dynamic(new, 1)
    for _ in range(steps):
        if cache is None:
            logits = model(tokens[:, -max_seq_len:])
        else:
            logits = model(new, cache=cache)
        new = sample_next(logits[:, -1], temperature, top_k, generator)
        tokens = torch.cat((tokens, new), dim=1)
    return tokens
