"""What a training step holds: estimated, measured, and with its activations recomputed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hc_compile as hc
from hc_compile.layers import RotaryEmbedding, compute_memory_footprint
from hc_compile.models import Transformer, TransformerConfig, TransformerWithHC
from profiles.dense_net import timed_steps

MEGABYTE = 1e6
VOCABULARY = 50257


@dataclass(frozen=True)
class Model:
    """One network and its batch; kind "with_hc" is TransformerWithHC, else a preset's name."""

    name: str
    kind: str
    width: int
    layers: int
    heads: int
    batch: int
    length: int
    streams: int = 4
    checkpointed: bool = False
    vocabulary: int = VOCABULARY

    def build(self, device: str) -> nn.Module:
        """The network on a device; TransformerWithHC in float32, a preset with bf16 streams."""
        if self.kind == "with_hc":
            with torch.device(device):
                model = TransformerWithHC(
                    self.vocabulary,
                    self.width,
                    self.layers,
                    self.heads,
                    max_seq_length=self.length,
                    expansion_rate=self.streams,
                )
            if self.checkpointed:
                model.enable_gradient_checkpointing()
            return model
        cfg = TransformerConfig(
            vocab_size=self.vocabulary,
            dim=self.width,
            layers=self.layers,
            heads=self.heads,
            ffn_dim=-(-8 * self.width // 3 // 64) * 64,
            max_seq_len=self.length,
            hc=hc.HCConfig(self.width, None if self.streams > 1 else 1, self.kind),
            stream_dtype=torch.bfloat16,
        )
        return Transformer(cfg, device=device)


def _step(model: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer) -> Callable:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens)
        F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return step


def measure_memory(model: Model, device: str, repeats: int) -> dict:
    """Estimate, measured peak (on a GPU) and time of a training step with AdamW."""
    cuda = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if cuda else 0
    torch.manual_seed(0)
    built = model.build(device)
    estimate = compute_memory_footprint(built, model.batch, model.length)
    tokens = torch.randint(model.vocabulary, (model.batch, model.length), device=device)
    optimizer = torch.optim.AdamW(built.parameters(), fused=True)
    step = _step(built, tokens, optimizer)
    step()
    measured = None
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        measured = (torch.cuda.max_memory_allocated() - before) / MEGABYTE
    times = timed_steps(step, device, repeats)
    return {
        "model": model.name,
        "parameters": sum(p.numel() for p in built.parameters()),
        "batch": model.batch,
        "length": model.length,
        "checkpointed": model.checkpointed,
        "estimated_mb": estimate["estimated_training_mb"],
        "estimated_activation_mb": estimate["estimated_activation_mb"],
        "measured_mb": measured,
        "step_ms": statistics.median(times),
    }


def rotary_cache_mb(layers: int, head_dim: int, positions: int) -> dict[str, float]:
    """Megabytes of rotary tables when every layer has its own, and when all share one."""
    found = {}
    for name in ("own", "shared"):
        one = RotaryEmbedding(head_dim, positions)
        ropes = [RotaryEmbedding(head_dim, positions) for _ in range(layers)]
        modules = nn.ModuleList([one] * layers if name == "shared" else ropes)
        found[name] = sum(b.numel() * b.element_size() for b in modules.buffers()) / MEGABYTE
    return found
