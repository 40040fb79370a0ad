"""RMSNorm, QK-norm + RoPE, SwiGLU, alone and inside a hyper-connected sublayer, in every way.

Every way of a case computes the same function of the same inputs: plain torch as it stands, the
same under plain torch.compile ("Inductor") and hc.compile (longer rows on chip, passes over hc::
ops), and Liger-Kernel's hand-written Triton where that is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import hc_compile as hc
from hc_compile import monitor
from hc_compile.layers import apply_rope, fused_swiglu, rms_norm, rope_tables
from profiles.capture import capture
from profiles.sublayer import draw_coefficients
from profiles.timing import Effort, floor_ms, measure

EPS = 1e-6
LIGER = "Liger-Kernel"


@dataclass(frozen=True)
class Size:
    """Tokens [batch, length], width C, heads and key heads, hidden size F, streams."""

    batch: int
    length: int
    width: int
    heads: int
    key_heads: int
    ffn: int
    streams: int = 4

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Case:
    """One function: its inputs, ways, and the C-units that forward and train must move.

    units: (forward, train) in tokens × width elements, (0, 0) where no floor is stated.
    """

    inputs: tuple[Tensor, ...]
    ways: dict[str, Callable]
    units: tuple[float, float]


def _randn(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(size, dtype=dtype, device=device).requires_grad_()


def _ways(plain: Callable, liger: Callable | None) -> dict[str, Callable]:
    found = {"eager": plain, "Inductor": torch.compile(plain, dynamic=False)}
    found["hc.compile"] = hc.compile(plain, dynamic=False)
    return found | ({} if liger is None else {LIGER: liger})


def _liger(device: str) -> bool:
    return device.startswith("cuda") and find_spec("liger_kernel") is not None


def norm_case(size: Size, dtype: torch.dtype, device: str) -> Case:
    """y = RMSNorm(x)·w."""
    inputs = (
        _randn((size.tokens, size.width), dtype, device),
        _randn((size.width,), dtype, device),
    )
    return Case(inputs, _ways(_norm, _liger_norm if _liger(device) else None), (2, 5))


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return rms_norm(x, w, EPS)


def _liger_norm(x: Tensor, w: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def rope_case(size: Size, dtype: torch.dtype, device: str) -> Case:
    """RMSNorm over each query and key head, then half-split rotary positions."""
    head = size.width // size.heads
    inputs = (
        _randn((size.batch, size.length, size.heads, head), dtype, device),
        _randn((size.batch, size.length, size.key_heads, head), dtype, device),
        _randn((head,), dtype, device),
        _randn((head,), dtype, device),
    )
    cos, sin = (table.to(device) for table in rope_tables(size.length, head))
    plain = partial(_qk_rope, cos=cos, sin=sin)
    whole = [torch.cat((table, table), -1).unsqueeze(0).to(dtype) for table in (cos, sin)]
    liger = partial(_liger_qk_rope, cos=whole[0], sin=whole[1]) if _liger(device) else None
    share = 1 + size.key_heads / size.heads
    return Case(inputs, _ways(plain, liger), (2 * share, 5 * share))


def _qk_rope(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    q, k = rms_norm(q, wq, EPS).transpose(1, 2), rms_norm(k, wk, EPS).transpose(1, 2)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


def _liger_qk_rope(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = _liger_norm(q, wq).transpose(1, 2), _liger_norm(k, wk).transpose(1, 2)
    return LigerRopeFunction.apply(q, k, cos, sin)


def swiglu_case(size: Size, dtype: torch.dtype, device: str) -> Case:
    """silu(gate) ⊙ up."""
    inputs = tuple(_randn((size.tokens, size.ffn), dtype, device) for _ in range(2))
    share = size.ffn / size.width
    liger = _liger_swiglu if _liger(device) else None
    return Case(inputs, _ways(fused_swiglu, liger), (3 * share, 8 * share))


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


class Sublayer(nn.Module):
    """An mHC sublayer whose branch is a norm and a gate, without products."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str, liger: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        cfg = hc.HCConfig(size.width, size.streams)
        self.connection = hc.HyperConnection(cfg, 1, device=device)
        self.connection.apply(draw_coefficients)
        self.weight = nn.Parameter(torch.ones(size.width, device=device, dtype=dtype))
        self.norm = _liger_norm if liger else _norm
        self.gate = _liger_swiglu if liger else fused_swiglu

    def forward(self, x: Tensor) -> Tensor:
        """Streams [T, n, C] -> the same."""
        u, add_residual = self.connection(x)
        return add_residual(self.gate(self.norm(u, self.weight), u))


def sublayer_case(size: Size, dtype: torch.dtype, device: str) -> Case:
    """The functions next to hyper-connection ops; Liger's inside the same compiled sublayer.

    "watched" has a monitor of its residual mix.
    """
    x = _randn((size.tokens, size.streams, size.width), dtype, device)
    plain, watched = (Sublayer(size, dtype, device, liger=False) for _ in range(2))
    monitor.watch(watched)
    ways: dict[str, Callable] = {
        "eager": plain,
        "hc.compile, watched": hc.compile(watched, dynamic=False),
        "hc.compile": hc.compile(plain, dynamic=False),
    }
    if _liger(device):
        ways[LIGER] = hc.compile(Sublayer(size, dtype, device, liger=True), dynamic=False)
    return Case((x,), ways, (0, 0))


CASES: dict[str, Callable[[Size, torch.dtype, str], Case]] = {
    "RMSNorm": norm_case,
    "QK-norm + RoPE": rope_case,
    "SwiGLU": swiglu_case,
    "mHC sublayer, RMSNorm, SwiGLU": sublayer_case,
}


@torch.no_grad()
def _outputs(case: Case, way: Callable) -> tuple[Tensor, ...]:
    out = way(*case.inputs)
    return out if isinstance(out, tuple) else (out,)


def _difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _calls(case: Case, way: Callable) -> dict[str, Callable[[], object]]:
    """Forward without grad, and forward with backward against random cotangents."""
    parameters = list(way.parameters()) if isinstance(way, nn.Module) else []
    cotangents = tuple(torch.randn_like(out) for out in _outputs(case, way))
    leaves = [*case.inputs, *parameters]

    def train() -> object:
        result = way(*case.inputs)
        return torch.autograd.grad(result, leaves, cotangents)

    return {"forward": torch.no_grad()(lambda: way(*case.inputs)), "train": train}


def measure_case(
    name: str, size: Size, dtype: torch.dtype, device: str, effort: Effort, bandwidth: float
) -> Iterator[dict]:
    """One record a way: times without and with a CUDA graph, launches, × floor of the train.

    difference: from the eager way's outputs, over their largest element.
    """
    torch.compiler.reset()
    case = CASES[name](size, dtype, device)
    expected = _outputs(case, case.ways["eager"])
    for way, function in case.ways.items():
        record: dict = {"case": name, "way": way, "tokens": size.tokens, "width": size.width}
        record["difference"] = _difference(_outputs(case, function), expected)
        for direction, call in _calls(case, function).items():
            cost = measure(call, device, effort)
            with tempfile.TemporaryDirectory() as folder:
                launches = capture(call, folder, steps=2, memory=False).launches
            record |= {
                f"{direction}_ms": cost.ms,
                f"{direction}_graph_ms": cost.graph_ms,
                f"{direction}_launches": launches,
            }
        floor = floor_ms(case.units[1], size.tokens, size.width, dtype.itemsize, bandwidth)
        best = record["train_graph_ms"] or record["train_ms"]
        record["x_floor"] = best / floor if floor else None
        yield record
