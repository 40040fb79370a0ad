"""Prefill and decode of `hc_compile.models.Transformer` through its cache, in every way to run it.

Weights of branches, norms, embedding and head are in the streams' dtype; those of
hyper-connections stay fp32. The cache is as long as the longest prompt and decoding stands in its
middle, which costs as much as anywhere else: its shapes are static.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hc_compile as hc
from hc_compile.models import Transformer, TransformerConfig
from profiles.dense_net import Net
from profiles.sublayer import draw_coefficients
from profiles.timing import Effort, measure

VOCABULARY = 32_000

_fused = partial(hc.compile, fullgraph=True, dynamic=False)
WAYS: dict[str, Callable[[nn.Module], Callable] | None] = {
    "eager": None,
    "hc.compile": _fused,
    "hc.compile, reduce-overhead": partial(_fused, mode="reduce-overhead"),
}
OWN_GRAPHS = "hc.compile, reduce-overhead"  # makes CUDA graphs itself, so it can't be captured


@dataclass(frozen=True)
class Phase:
    """Prefill of `tokens` a row into an empty cache, or decoding of one token a row."""

    name: str
    batch: int
    tokens: int

    @property
    def label(self) -> str:
        """As tables print it."""
        return f"{self.name} {self.batch}×{self.tokens}"


def phases(prompts: list[int], batches: list[int]) -> list[Phase]:
    """Every prompt alone, then one token a row of every batch."""
    prefill = [Phase("prefill", 1, tokens) for tokens in prompts]
    return prefill + [Phase("decode", batch, 1) for batch in batches]


def build(net: Net, preset: str, device: str) -> Transformer:
    """The model of a preset with coefficients away from their initial values."""
    config = TransformerConfig(
        vocab_size=VOCABULARY if device.startswith("cuda") else 64,
        dim=net.width,
        layers=net.layers,
        heads=net.heads,
        ffn_dim=net.ffn,
        max_seq_len=net.length,
        hc=hc.HCConfig(net.width, preset=preset),
        stream_dtype=net.dtype,
    )
    torch.manual_seed(0)
    model = Transformer(config, device=device).requires_grad_(False).eval()
    model.apply(draw_coefficients)
    for name, parameter in model.named_parameters():
        if not (".hc_" in name or name.startswith(("expand.", "reduce."))):
            parameter.data = parameter.data.to(net.dtype)
    return model


def call_of(model: Transformer, run: Callable, phase: Phase, device: str) -> Callable[[], Tensor]:
    """One call of a phase, which can be repeated."""
    cache = model.new_cache(phase.batch)
    at = 0 if phase.name == "prefill" else model.cfg.max_seq_len // 2
    size = (phase.batch, phase.tokens)
    tokens = torch.randint(model.cfg.vocab_size, size, device=device)
    if phase.tokens > 1:
        torch._dynamo.mark_dynamic(tokens, 1)

    def call() -> Tensor:
        cache.reset(at)
        return run(tokens, cache=cache)

    return call


def measure_preset(
    net: Net, preset: str, ways: list[str], every: list[Phase], device: str, effort: Effort
) -> Iterator[dict]:
    """A record for every way and phase."""
    model = build(net, preset, device)
    for way in ways:
        torch.compiler.reset()
        counters.clear()
        make = WAYS[way]
        run = model if make is None else make(model)
        for phase in every:
            with torch.no_grad():
                call = call_of(model, run, phase, device)
                cost = measure(call, device, effort, graph=way != OWN_GRAPHS)
            yield {
                "preset": preset,
                "way": way,
                "phase": phase.label,
                "ms": cost.ms,
                "graph_ms": cost.graph_ms,
                "tokens_per_s": phase.batch * phase.tokens / cost.best_ms * 1e3,
                "first_seconds": cost.first_seconds,
                "graphs": counters["stats"]["unique_graphs"],
                "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
            }
