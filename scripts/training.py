"""Train a small byte-level transformer on real text.

python -m scripts.train --preset mhc --steps 300 --compile ops
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import hc_compile as hc
from hc_compile.models import Transformer
from scripts.text import Corpus, batch

Forward = Callable[[Tensor], Tensor]
WARMUP_STEPS = 3  # not timed: the first of them compile


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the same values give the same batches on every path."""

    steps: int = 200
    batch: int = 8
    length: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    device: str = "cpu"


@dataclass
class TrainResult:
    """What a run measured.

    Attributes:
        losses: one per step, nats per byte.
        step_seconds: one per step; on CUDA from events on the stream.
        compile_seconds: time of the warm-up steps beyond what the median step takes.
        first_logits: [B, S, V] of the first step, before any update.
        peak_bytes: CUDA's highest allocation over the timed steps, None on CPU.
        step: one more training step, for a profiler.
        resident_bytes: parameters, buffers and optimiser state between steps.
    """

    losses: list[float]
    step_seconds: list[float]
    compile_seconds: float
    first_logits: Tensor
    peak_bytes: int | None
    step: Callable[[], object]
    resident_bytes: int

    @property
    def median_seconds(self) -> float:
        """Median time of the steps after warm-up."""
        return statistics.median(self.step_seconds[WARMUP_STEPS:] or self.step_seconds)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last ten steps."""
        tail = self.losses[-10:]
        return sum(tail) / len(tail)


class StepClock:
    """Times steps: CUDA events on a GPU, which do not wait; the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.marks: list = []

    def mark(self) -> None:
        """Set a mark between two steps."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Time between neighbouring marks."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if not self.cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, then a cosine to a tenth."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


def progress(steps: int, label: str) -> Iterable[int]:
    """range(steps) behind a tqdm bar, or bare when tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{label}: {steps} steps")
        return range(steps)
    return tqdm(range(steps), desc=label, unit="step")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 of [B, S, V] logits."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def make_step(
    model: Transformer, forward: Forward, corpus: Corpus, cfg: TrainConfig
) -> tuple[Callable[[int], tuple[Tensor, Tensor]], torch.optim.Optimizer]:
    """One training step as a function of its number, returning (loss, logits), detached."""
    groups = hc.parameter_groups(model, weight_decay=cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.95), fused=True)

    def step(number: int) -> tuple[Tensor, Tensor]:
        tokens, targets = batch(corpus.train, cfg.batch, cfg.length, cfg.seed, number)
        tokens, targets = tokens.to(cfg.device), targets.to(cfg.device)
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * learning_rate_scale(number, cfg.steps)
        logits = forward(tokens)
        loss = cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), logits.detach()

    return step, optimizer


def train(
    model: Transformer, forward: Forward, corpus: Corpus, cfg: TrainConfig, label: str = "train"
) -> TrainResult:
    """Train `model` through `forward` (the model itself, or a compiled form of it).

    Args:
        model: owns the parameters, already on cfg.device.
        forward: tokens [B, S] -> logits [B, S, V].
        corpus: text.
        cfg: steps, batch, seed.
        label: shown beside the progress bar.
    Returns: losses and measurements.
    Raises:
        ValueError: when cfg.steps is less than 1.
    """
    if cfg.steps < 1:
        raise ValueError(f"steps must be at least 1, got {cfg.steps}")
    step, optimizer = make_step(model, forward, corpus, cfg)
    clock, losses, first = StepClock(cfg.device), [], torch.empty(0)
    began = time.perf_counter()
    clock.mark()
    warm_seconds = 0.0
    for number in progress(cfg.steps, label):
        loss, logits = step(number)
        clock.mark()
        losses.append(loss)
        if number == 0:
            first = logits.float().cpu()
        if number + 1 == min(WARMUP_STEPS, cfg.steps):
            if clock.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            warm_seconds = time.perf_counter() - began
    seconds = clock.seconds()
    result = TrainResult(
        losses=torch.stack(losses).tolist(),
        step_seconds=seconds,
        compile_seconds=0.0,
        first_logits=first,
        peak_bytes=torch.cuda.max_memory_allocated() if clock.cuda else None,
        step=lambda: step(cfg.steps),
        resident_bytes=resident_bytes(model, optimizer),
    )
    warm = min(WARMUP_STEPS, cfg.steps)
    result.compile_seconds = max(warm_seconds - warm * result.median_seconds, 0.0)
    return result


def resident_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimiser state."""

    def tensors() -> Iterator[Tensor]:
        yield from model.parameters()
        yield from model.buffers()
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    return sum(tensor.numel() * tensor.element_size() for tensor in tensors())


@torch.no_grad()
def held_out_loss(model: Transformer, corpus: Corpus, cfg: TrainConfig, batches: int = 4) -> float:
    """Mean loss over a few fixed batches of held-out text."""
    total = 0.0
    for number in range(batches):
        tokens, targets = batch(corpus.held_out, cfg.batch, cfg.length, cfg.seed, number)
        logits = model(tokens.to(cfg.device))
        total += cross_entropy(logits, targets.to(cfg.device)).item()
    return total / batches
