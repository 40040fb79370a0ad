"""The package's folded streams, [(b s), ..., d] or [(b s), d, ...], and our [b, ..., s, d]."""

from torch import Tensor

from custom_ops.constraint import check_count
from hc_compile.checks import require_float


def unfold(x: Tensor, streams: int, dim: int, channel_first: bool = False) -> Tensor:
    """[(b s), ..., d], or [(b s), d, ...] if channel_first, to [b, ..., s, d].

    Contiguous: one copy here, or every op of the read, the write and their backward makes its own.

    Raises: ValueError, TypeError if `residuals` has another shape or dtype.
    """
    require_float("residuals", x)
    legend = "[(b s), d, ...]" if channel_first else "[(b s), ..., d]"
    width = x.shape[1 if channel_first else -1] if x.dim() > 1 else None
    if width != dim or x.shape[0] % streams:
        raise ValueError(
            f"residuals must be {legend} with s = {streams}, d = {dim}, got {list(x.shape)}"
        )
    x = x.unflatten(0, (x.shape[0] // streams, streams))
    x = x.movedim(2, -1) if channel_first else x
    return x.movedim(1, -2).contiguous()


def fold(x: Tensor, channel_first: bool = False) -> Tensor:
    """Inverse of `unfold`."""
    x = x.movedim(-2, 1)
    x = x.movedim(-1, 2) if channel_first else x
    return x.flatten(0, 1)


def check_sizes(streams: int, dim: int, fracs: int = 1, views: int = 1) -> None:
    """Raise unless the counts are ints >= 1 and dim splits into fractions."""
    check_count("num_residual_streams", streams, least=1)
    check_count("dim", dim, least=1)
    check_count("num_fracs", fracs, least=1)
    check_count("num_input_views", views, least=1)
    if dim % fracs:
        raise ValueError(f"dim must be divisible by num_fracs = {fracs}, got {dim}")
