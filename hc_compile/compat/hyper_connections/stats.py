"""What `collect_stats` records: 0-d tensors without gradient."""

import torch
from torch import Tensor


@torch.no_grad()
def dynamic_stats(pre: Tensor, post: Tensor | None, res: Tensor) -> dict[str, Tensor]:
    """Means of the dynamic coefficients: alpha is read and mix, beta is write."""
    branch, residual = pre.abs().mean(), res.abs().mean()
    found = {
        "alpha_branch_mean": pre.mean(),
        "alpha_branch_abs_mean": branch,
        "alpha_residual_mean": res.mean(),
        "alpha_residual_abs_mean": residual,
        "alpha_branch_residual_ratio": branch / (residual + 1e-8),
    }
    if post is not None:
        found |= {
            "beta_mean": post.mean(),
            "beta_abs_mean": post.abs().mean(),
            "beta_min": post.min(),
            "beta_max": post.max(),
        }
    return found


@torch.no_grad()
def manifold_stats(pre: Tensor, post: Tensor | None, h_res: Tensor) -> dict[str, Tensor]:
    """How doubly stochastic H_res is, and the smallest coefficients."""
    found = {
        "h_res_min": h_res.min(),
        "h_res_row_sum": h_res.sum(-1).mean(),
        "h_res_col_sum": h_res.sum(-2).mean(),
        "h_pre_min": pre.min(),
    }
    return found if post is None else found | {"h_post_min": post.min()}
