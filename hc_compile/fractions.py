"""Fractions of the width as streams of their own (Frac-connections, arXiv 2503.14125).

f fractions turn x [..., n, C] into [..., n·f, C/f], in the order (stream, fraction): a reshape.
A view of the branch is f views, fraction by fraction; a branch output is f outputs, and fraction g
of it goes only to fraction g of each stream.
"""

import torch
from torch import Tensor


def split(x: Tensor, fractions: int) -> Tensor:
    """[..., n, C] to [..., n·f, C/f]."""
    return x if fractions == 1 else x.unflatten(-1, (fractions, -1)).flatten(-3, -2)


def merge(x: Tensor, fractions: int) -> Tensor:
    """Inverse of `split`."""
    if fractions == 1:
        return x
    return x.unflatten(-2, (x.shape[-2] // fractions, fractions)).flatten(-2)


def join_views(u: Tensor, views: int, fractions: int) -> Tensor:
    """Branch inputs [..., V·f, C/f] as [..., V, C], without V where it is 1."""
    if fractions == 1:
        return u
    u = merge(u, fractions)
    return u.squeeze(-2) if views == 1 else u


def split_output(y: Tensor, branches: int, fractions: int) -> Tensor:
    """Branch outputs [..., C] or [..., W, C] as [..., W·f, C/f]."""
    if fractions == 1:
        return y
    return split(y.unsqueeze(-2) if branches == 1 else y, fractions)


def own_outputs(post: Tensor, branches: int, fractions: int) -> Tensor:
    """post [..., n·f] or [..., W, n·f] as [..., W·f, n·f], zero between different fractions."""
    if fractions == 1:
        return post
    post = post.unsqueeze(-2) if branches == 1 else post
    eye = torch.eye(fractions, dtype=post.dtype, device=post.device)
    own = eye.repeat(1, post.shape[-1] // fractions)
    return (post.unsqueeze(-2) * own).flatten(-3, -2)
