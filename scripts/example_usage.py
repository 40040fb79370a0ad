"""Four short examples of TransformerWithHC and of the hyper-connection block alone.

python -m scripts.example_usage
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hc_compile as hc
from hc_compile.models import TransformerWithHC

VARIANTS = {
    "DHC, tanh": dict(use_tanh=True),
    "DHC, no tanh": dict(use_tanh=False),
    "SHC": dict(static_weights=True),
}
SIZES = {"small": (768, 12, 12), "base": (1024, 24, 16), "large": (1536, 32, 24)}
TINY = dict(vocab_size=16, hidden_size=32, num_layers=2, num_heads=2, max_seq_length=32)


def counting(rows: int, length: int, seed: int) -> Tensor:
    """[rows, length] tokens that count up modulo 16 from random starts."""
    starts = torch.randint(16, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(length)) % 16


def train(model: nn.Module, steps: int = 60) -> list[float]:
    """Teach `model` to count; the usual loop, with the papers' weight-decay groups."""
    optimizer = torch.optim.AdamW(hc.parameter_groups(model), lr=1e-2)
    losses = []
    for step in range(steps):
        tokens = counting(8, 17, step)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def example_1_train_and_generate() -> tuple[list[float], list[int]]:
    """Train a tiny model, then let it count on with cached keys and values."""
    torch.manual_seed(0)
    model = TransformerWithHC(**TINY, dropout=0.0)
    losses = train(model)
    out = model.eval().generate(torch.tensor([[3, 4, 5]]), 6, temperature=0.0)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; 3 4 5 continues {out[0, 3:].tolist()}")
    return losses, out[0, 3:].tolist()


def example_2_variants_and_rates() -> dict[str, float]:
    """The paper's three variants and three expansion rates, after the same few steps."""
    found = {}
    for name, options in VARIANTS.items():
        for n in (2, 4, 8):
            torch.manual_seed(0)
            model = TransformerWithHC(**TINY, dropout=0.0, expansion_rate=n, **options)
            found[f"{name} × {n}"] = train(model, 12)[-1]
            count = model.get_num_params()
            print(f"{name:12} n = {n}: {count:7,} parameters, loss {found[f'{name} × {n}']:.3f}")
    return found


class ConvBlock(nn.Module):
    """A block of your own: two branches between the streams, no transformer needed."""

    def __init__(self, cfg: hc.HCConfig, index: int):
        super().__init__()
        self.hc_conv, self.hc_mlp = (hc.HyperConnection(cfg, 2 * index + k) for k in (0, 1))
        self.norm1, self.norm2 = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)
        self.conv = nn.Conv1d(cfg.dim, cfg.dim, 3, padding=1, groups=cfg.dim)
        self.mlp = nn.Linear(cfg.dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Streams [B, S, n, C] -> the same."""
        u, add_residual = self.hc_conv(x)
        x = add_residual(self.conv(self.norm1(u).transpose(1, 2)).transpose(1, 2))
        u, add_residual = self.hc_mlp(x)
        return add_residual(F.gelu(self.mlp(self.norm2(u))))


def example_3_block_alone() -> tuple[Tensor, float]:
    """Hyper-connections in a network that is no transformer."""
    torch.manual_seed(0)
    cfg = hc.HCConfig(dim=24, streams=4, preset="dhc")
    blocks = nn.Sequential(*(ConvBlock(cfg, index) for index in range(2)))
    h = torch.randn(2, 10, 24)
    out = hc.reduce_streams(blocks(hc.expand_streams(h, cfg)), cfg)
    out.square().mean().backward()
    largest = max(p.grad.abs().max().item() for p in blocks.parameters() if p.grad is not None)
    print(f"[2, 10, 24] -> {list(out.shape)}, largest gradient {largest:.3g}")
    return out, largest


def example_4_sizes() -> dict[str, int]:
    """The three sizes on the meta device (no memory), with exact parameter counts."""
    found = {}
    for name, (hidden, layers, heads) in SIZES.items():
        with torch.device("meta"):
            model = TransformerWithHC(50257, hidden, layers, heads, expansion_rate=4)
        found[name] = model.get_num_params(non_embedding=False)
        without = model.get_num_params()
        print(f"{name:6} {found[name]:12,} parameters, {without:12,} without embeddings")
    return found


EXAMPLES = (
    example_1_train_and_generate,
    example_2_variants_and_rates,
    example_3_block_alone,
    example_4_sizes,
)


def main() -> None:
    """All four."""
    for example in EXAMPLES:
        print(f"\n{example.__name__}: {(example.__doc__ or '').splitlines()[0]}")
        example()


if __name__ == "__main__":
    main()
