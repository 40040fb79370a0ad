"""What the drop-ins are timed on: mHC-Triton's three operations and the package's layers.

Every case is a function of tensors and modules; plain PyTorch is written as its authors' README
and package write it, einsums on unexpanded weights, in the dtype of the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

import hc_compile as hc
from custom_ops import reference
from hc_compile.compat import hyper_connections as ours
from hc_compile.compat import mhc_triton
from hc_compile.compat.hyper_connections import mHCv2 as our_v2
from profiles.sublayer import branch

# Published for an H100 SXM5 at batch 8, sequence 2048, dim 4096: (PyTorch ms, Triton ms).
CLAIMED = {"sinkhorn": (0.42, 0.08), "stream mix": (1.85, 0.32), "step": (8.2, 1.9)}
ORIGINAL = "mHC-Triton"


@dataclass(frozen=True)
class Size:
    """Batch, sequence, width of a stream, streams."""

    batch: int
    sequence: int
    dim: int
    streams: int = 4


@dataclass(frozen=True)
class Case:
    """One line of a table: function(*inputs) gives tensors; parameters are not counted as saved.

    units: C-units that must move forward, None without streams.
    """

    table: str
    op: str
    way: str
    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()
    units: int | None = None


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


def plain_sinkhorn(m: Tensor) -> tuple[Tensor]:
    return (reference.sinkhorn(m, 20, "abs", "row", "add", 1e-8),)


def plain_mix(x: Tensor, pre: Tensor, res: Tensor) -> tuple[Tensor, Tensor]:
    u = torch.einsum("bn,bsnd->bsd", pre.to(x.dtype), x)
    return u, torch.einsum("bnm,bsmd->bsnd", res.to(x.dtype), x)


class PlainLayer(nn.Module):
    """mHC-Triton's layer in plain torch: pooled over the sequence as theirs, or per token."""

    def __init__(self, layer: mhc_triton.HyperConnection, pooled: bool):
        super().__init__()
        self.layer, self.pooled = layer, pooled

    def forward(self, x: Tensor) -> Tensor:
        p = self.layer
        alpha = torch.cat([p.alpha_pre, p.alpha_post, p.alpha_res])
        bias = torch.cat([p.H_pre_base, p.H_post_base, p.H_res_base.flatten()])
        source = x.mean(1) if self.pooled else x
        made = reference.coefficients(source, p.phi.mT, alpha, bias, p.constraint)
        pre, post, res = (t.to(x.dtype) for t in made)
        at = "b" if self.pooled else "bs"
        u = torch.einsum(f"{at}n,bsnd->bsd", pre, x)
        mixed = torch.einsum(f"{at}nm,bsmd->bsnd", res, x)
        return mixed + torch.einsum(f"{at}n,bsd->bsnd", post, branch(u))


def our_step(layer: nn.Module) -> Callable[[Tensor], tuple[Tensor]]:
    def step(x: Tensor) -> tuple[Tensor]:
        u, add_residual = layer(x)
        return (add_residual(branch(u)),)

    return step


def original(device: str) -> ModuleType | None:
    """mHC-Triton itself, whose package is called mhc, where it is installed and can run."""
    if not device.startswith("cuda") or find_spec("mhc") is None:
        return None
    import mhc

    return mhc if hasattr(mhc, "fused_stream_mix") else None


def matrix_cases(size: Size, device: str) -> Iterator[Case]:
    """Sinkhorn alone: one matrix a sequence, as published, and one a token."""
    for count in (size.batch, size.batch * size.sequence):
        m = draw(count, size.streams, size.streams, device=device)
        op = "sinkhorn" if count == size.batch else f"sinkhorn, {count} matrices"
        yield Case("triton", op, "PyTorch", plain_sinkhorn, (m,))
        if theirs := original(device):
            yield Case("triton", op, ORIGINAL, lambda m, t=theirs: (t.sinkhorn_knopp(m),), (m,))
        yield Case("triton", op, "ours", lambda m: (mhc_triton.sinkhorn_knopp(m),), (m,))


def mix_cases(size: Size, device: str) -> Iterator[Case]:
    """The stream mix, read and residual."""
    b, s, n, d = size.batch, size.sequence, size.streams, size.dim
    x = draw(b, s, n, d, device=device, dtype=torch.bfloat16)
    weights = draw(b, n, device=device), draw(b, n, n, device=device)
    units = 2 * n + 1
    ways: dict[str, Callable] = {"PyTorch": plain_mix}
    if theirs := original(device):
        ways[ORIGINAL] = theirs.fused_stream_mix
    ways["ours"] = mhc_triton.fused_stream_mix
    for way, function in ways.items():
        yield Case("triton", "stream mix", way, function, (x, *weights), units=units)


def step_cases(size: Size, device: str) -> Iterator[Case]:
    """A whole layer around a branch that copies."""
    b, s, n, d = size.batch, size.sequence, size.streams, size.dim
    layer = mhc_triton.HyperConnection(d, n).to(device)
    with torch.no_grad():
        layer.phi.normal_(0, (n * d) ** -0.5)
    x = draw(b, s, n, d, device=device, dtype=torch.bfloat16)
    rest = tuple(layer.parameters())
    step = our_step(layer)
    ways: dict[str, Callable] = {
        "PyTorch, pooled": lambda x: (PlainLayer(layer, True)(x),),
        "PyTorch, per token": lambda x: (PlainLayer(layer, False)(x),),
        "ours, eager": step,
        "ours, torch.compile": torch.compile(step, dynamic=False),
        "ours, hc.compile": hc.compile(step, dynamic=False),
    }
    for way, function in ways.items():
        yield Case("triton", "step", way, function, (x,), rest, units=3 * n + 4)
    if theirs := original(device):
        peer = theirs.HyperConnection(d, n).to(device)
        with torch.no_grad():
            peer.phi.normal_(0, (n * d) ** -0.5)
        rest = tuple(peer.parameters())
        yield Case("triton", "step", ORIGINAL, our_step(peer), (x,), rest, units=3 * n + 4)


LAYERS: dict[str, tuple[str, dict]] = {
    "HyperConnections": ("HyperConnections", {}),
    "HyperConnections, 4 fractions": ("HyperConnections", {"num_fracs": 4}),
    "mHC": ("mHC", {}),
    "mHCv2": ("mHCv2", {}),
    "HyperConnections(mhc=True)": ("HyperConnections", {"mhc": True}),
}


def package_cases(size: Size, device: str) -> Iterator[Case]:
    """The package's layers and ours around a branch that copies, eager and compiled."""
    modules: dict[str, dict] = {
        "ours": {
            "HyperConnections": ours.HyperConnections, "mHC": ours.mHC, "mHCv2": our_v2.mHC,
        }
    }  # fmt: skip
    if find_spec("hyper_connections"):
        import hyper_connections as package
        from hyper_connections import mHCv2 as package_v2

        theirs = {"HyperConnections": package.HyperConnections, "mHC": package.mHC}
        modules = {"package": theirs | {"mHCv2": package_v2.mHC}} | modules
    for op, (kind, options) in LAYERS.items():
        for owner, kinds in modules.items():
            if owner == "package" and "mhc" in options:
                continue  # the fork is no package
            yield from layer_cases(op, owner, kinds[kind], options, size, device)


def layer_cases(op, owner, kind, options, size: Size, device: str) -> Iterator[Case]:
    """One layer, eager and compiled."""
    b, s, n, d = size.batch, size.sequence, size.streams, size.dim
    torch.manual_seed(0)
    layer = kind(n, dim=d, layer_index=0, **options).to(device)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("dynamic") and p.dim():
                p.normal_(0, d**-0.5)
    shape = (b, s, n, d) if op == "mHCv2" else (b * n, s, d)
    x = draw(*shape, device=device, dtype=torch.bfloat16)
    layer = (
        layer.bfloat16() if owner == "package" and kind.__name__ == "HyperConnections" else layer
    )
    step = our_step(layer)
    rest = tuple(p for p in layer.parameters())
    for way, function in ((owner, step), (f"{owner}, torch.compile", None)):
        function = torch.compile(step, dynamic=False) if function is None else function
        yield Case("package", op, way, function, (x,), rest)
