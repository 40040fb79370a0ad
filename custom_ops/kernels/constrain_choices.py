"""What the constrain kernels are compiled for: the record as tuples, and the tile sizes."""

from functools import lru_cache

from custom_ops.constraint import Constraint
from custom_ops.kernels.tile import padded


@lru_cache(maxsize=1024)
def parts_of(c: Constraint) -> tuple:
    """The three compile-time part tuples of a record."""
    n = c.streams
    pre, post, res = c.sizes
    stream = c.projection == "stream"
    rows = c.rows
    pre_shape = (pre // n, n)
    post_shape = (post // n, n)
    flat = c.manifold in ("permutation", "kronecker")
    res_shape = (min(res, 1), res) if flat else (res // n, n)
    columns = (0, pre // n, (pre + post) // n) if stream else (0, pre, pre + post)
    strides = ((1, rows), (1, rows), (rows, 1)) if stream else ((n, 1), (n, 1), (n, 1))
    axes = (1, 1, 0) if stream else (-1, -1, -1)
    shapes = (pre_shape, post_shape, res_shape)
    kinds = (
        (c.pre, 1.0, c.pre_eps),
        (c.post, c.post_scale, c.post_eps),
        (c.manifold, c.temperature, *((1, n) if c.transpose else (n, 1))),
    )
    biases = (0, pre, pre + post)
    return tuple(
        (a, b, padded(a), padded(b), columns[i], *strides[i], biases[i], axes[i], *kinds[i])
        for i, (a, b) in enumerate(shapes)
    )


def choices_of(c: Constraint, width: int) -> dict:
    """The compile-time tuples of a record."""
    rule: tuple = ()
    if c.manifold == "sinkhorn":
        rule = (c.iterations, c.start, c.first, c.denominator, c.eps)
    elif c.manifold == "newton-schulz":
        rule = c.schedule
    pre, post, res = parts_of(c)
    norm = (c.norm_form, c.norm_eps, width, c.squash)
    return {
        "n": c.streams, "M": c.total, "NORM": norm, "PRE": pre, "POST": post, "RES": res,
        "RULE": rule,
    }  # fmt: skip


# (manifold, N) -> (tokens a program, warps); other manifolds take what is under None. Warps must
# not share a token, so a program of fewer than 32 tokens a warp has one warp.
FORWARD = {
    None: {1: (128, 4), 2: (128, 4), 4: (16, 1), 8: (8, 1), 16: (4, 1)},
    "newton-schulz": {1: (128, 4), 2: (128, 4), 4: (32, 1), 8: (16, 1)},
    "permutation": {1: (128, 4), 2: (128, 4), 4: (16, 1), 8: (4, 1)},
}
BACKWARD = {
    None: {1: (32, 1), 2: (32, 1), 4: (16, 1), 8: (8, 1), 16: (1, 1)},
    "newton-schulz": {1: (32, 1), 2: (32, 1), 4: (32, 1), 8: (8, 1)},
    "permutation": {1: (32, 1), 2: (32, 1), 4: (16, 1), 8: (4, 1)},
}
CHUNK = {1: 10, 2: 10, 4: 10, 8: 4, 16: 4}


def tile_of(table: dict, c: Constraint) -> tuple[int, int]:
    """Tokens a program and warps."""
    tiles = table.get(c.manifold, table[None])
    if padded(c.streams) not in tiles:
        raise ValueError(
            f"streams must be <= {max(tiles)} for the kernels of manifold {c.manifold!r} (or set "
            f"HC_DISABLE_TRITON=1), got {c.streams}"
        )
    return tiles[padded(c.streams)]
