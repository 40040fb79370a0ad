"""Small models away from their initial values, and inputs for them."""

import torch
from torch import nn

from hc_compile.models import TransformerWithHC

VARIANTS = {
    "dhc": dict(use_tanh=True, static_weights=False),
    "dhc-no-tanh": dict(use_tanh=False, static_weights=False),
    "shc": dict(use_tanh=True, static_weights=True),
}


def make(seed=0, dtype=torch.float32, moved=False, **options):
    torch.manual_seed(seed)
    options = dict(vocab_size=37, hidden_size=16, num_layers=2, num_heads=2) | options
    model = TransformerWithHC(**(dict(max_seq_length=12, dropout=0.0) | options)).to(dtype)
    if moved:  # away from the residual that every variant starts as
        move(model)
    return model


def move(module):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "coefficients" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))


def ids(rows=2, length=9, seed=0):
    return torch.randint(37, (rows, length), generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(model, seed=0):
    logits = model(ids(seed=seed))
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids(seed=seed + 10).flatten())
