"""Train a small byte-level transformer on real text.

python -m scripts.train --preset mhc --steps 300 --compile ops
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import hc_compile as hc
from hc_compile.models import Transformer, TransformerConfig, generate
from scripts.text import Corpus, decode, load_corpus
from scripts.training import Forward, TrainConfig, held_out_loss, train


def sample_text(model: Transformer, corpus: Corpus, length: int = 200, seed: int = 0) -> str:
    """The first 32 held-out bytes, continued by the model."""
    device = model.embed.weight.device
    prompt = corpus.held_out[:32].long()[None].to(device)
    out = generate(
        model,
        prompt,
        length,
        max_seq_len=model.cfg.max_seq_len,
        temperature=0.8,
        top_k=40,
        seed=seed,
    )
    return decode(out[0])


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that the quickstart shares."""
    parser.add_argument("--preset", default="mhc", choices=sorted(hc.PRESETS))
    parser.add_argument("--streams", type=int, help="default: the preset's")
    parser.add_argument("--iterations", type=int, help="of Sinkhorn; default: the preset's")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--text", type=Path, help="a file or folder; default: Python's library")
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--seed", type=int, default=0)


def connection_config(args: argparse.Namespace, dim: int) -> hc.HCConfig:
    """The hyper-connection that the options name."""
    return hc.HCConfig(dim, args.streams, args.preset, iterations=args.iterations)


def compiled(model: Transformer, how: str) -> Forward:
    """`how`: "none", "plain" (torch.compile) or "ops" (the hc_inductor backend)."""
    return {"none": lambda m: m, "plain": torch.compile, "ops": hc.compile}[how](model)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a byte-level transformer on real text.")
    add_model_arguments(parser)
    for name, value in (("dim", 128), ("layers", 2), ("heads", 4), ("batch", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--compile", choices=("none", "plain", "ops"), default="none")
    parser.add_argument("--save", type=Path, help="write the trained state dict here")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg = TrainConfig(
        steps=args.steps or 200,
        batch=args.batch,
        length=args.length,
        learning_rate=args.learning_rate,
        seed=args.seed,
        device=device,
    )
    torch.manual_seed(cfg.seed)
    connection = connection_config(args, args.dim)
    if args.compile == "plain":
        connection = replace(connection, implementation="plain")
    model = Transformer(
        TransformerConfig(
            dim=args.dim,
            layers=args.layers,
            heads=args.heads,
            ffn_dim=3 * args.dim,
            max_seq_len=args.length,
            hc=connection,
        )
    ).to(device)
    corpus = load_corpus(args.text)
    result = train(model, compiled(model, args.compile), corpus, cfg, args.preset)
    print(f"loss {result.final_loss:.4f}, held out {held_out_loss(model, corpus, cfg):.4f}")
    print(f"{result.median_seconds * 1e3:.1f} ms a step on {device}")
    print(sample_text(model, corpus))
    if args.save:
        torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
