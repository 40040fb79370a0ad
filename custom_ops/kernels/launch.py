"""How every Triton kernel of this package is launched, and the tile sizes they share.

Legend: T tokens, n streams, C width of a stream, K = n·C, M coefficients a token, V views, W
branch outputs. T stands for leading dimensions, any number of them: only the order in memory
matters to a kernel, and reshaping around it would cost a compiler time. A tile depends on
(n, C, dtype) and never on T, so nothing recompiles when the number of tokens changes; how many
programs share a row may depend on T (slots.py).
"""

from math import prod

import torch

from custom_ops.kernels.analysis import remember
from custom_ops.registration import INTERPRETED


def launch(kernel, grid, *args, **meta) -> None:
    """Launch `kernel` so that `torch.compile` can trace it, or plainly under the interpreter."""
    if INTERPRETED:  # wrap_triton rejects interpreted kernels
        kernel[grid](*args, **meta)
    else:
        remember()
        torch.library.wrap_triton(kernel)[grid](*args, **meta)


def cdiv(size, block):
    """ceil(size / block) of ints and symbols; Triton's own is wrapped for its compiler."""
    return (size + block - 1) // block


def tokens_of(x: torch.Tensor):
    """T of streams [..., n, C]."""
    return prod(x.shape[:-2])


def plural(t: torch.Tensor, x: torch.Tensor) -> int:
    """V of t [..., V, C] (or W of [..., W, C]) beside streams x [..., n, C]; 1 of t [..., C]."""
    return t.shape[-2] if t.dim() == x.dim() else 1


def generation(device: torch.device) -> int:
    """8 for Ampere, 9 for Hopper, 10 for Blackwell: tiles differ. A CPU counts as Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def memory_speed(device: torch.device) -> float:
    """Bytes a second by the memory's clock and width: 3.35e12 of an H100, as a CPU counts."""
    if device.type != "cuda":
        return 3.35e12
    properties = torch.cuda.get_device_properties(device)
    return 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8


def column_block(width: int, limit: int, least: int = 128) -> int:
    """The power of two in [least, limit] that pads `width` least; the largest of equals."""
    best = least
    block = least
    while block <= limit:
        if cdiv(width, block) * block <= cdiv(width, best) * best:
            best = block
        block *= 2
    return best


def plane_tile(width: int) -> dict:
    """Tile of a kernel without sums over columns: one token × up to 512 columns."""
    block = column_block(width, 512)
    return {"BLOCK_T": 1, "BLOCK_C": block, "num_warps": max(1, block // 128)}


def row_tile(width: int, limit: int) -> dict:
    """Tile of a kernel that walks one token's row; GROUP columns of a lane are added first."""
    block = column_block(width, limit)
    warps = max(1, min(4, block // 256))
    return {"BLOCK_C": block, "GROUP": min(8, block // (32 * warps)), "num_warps": warps}
