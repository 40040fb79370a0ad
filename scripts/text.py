"""Real text as bytes: the sources and text of the running Python, or any file or folder."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = {".py", ".txt", ".rst", ".md"}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}
HELD_OUT = 10  # the last 1/10 of every file is held out


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out.

    Attributes:
        train, held_out: [bytes] uint8.
        source: where the text came from, for a person.
        files: how many files it is made of.
    """

    train: Tensor
    held_out: Tensor
    source: str
    files: int


def text_files(root: Path) -> list[Path]:
    """Text files under a folder, in an order that mixes its parts and never changes."""
    found = [
        path
        for path in root.rglob("*")
        if path.suffix in SUFFIXES
        and not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
        and path.is_file()
    ]
    return sorted(found, key=lambda path: _digest(path.relative_to(root).as_posix()))


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _contents(files: list[Path], limit: int) -> Iterator[bytes]:
    """The files' bytes up to `limit` in all; empty and binary files are left out."""
    for path in files:
        data = path.read_bytes()[:limit]
        if not data or b"\0" in data:
            continue
        limit -= len(data)
        yield data
        if limit <= 0:
            return


def load_corpus(path: Path | str | None = None, limit: int = 4_000_000) -> Corpus:
    """Read text and split it; the same files give the same split.

    Args:
        path: a file of any kind of text, or a folder searched for .py, .txt, .rst and .md; None
            takes the standard library of the running Python.
        limit: stop after this many bytes.
    Returns: a `Corpus`; the last tenth of every file is held out.
    Raises:
        FileNotFoundError: when path does not exist.
        ValueError: when less than 2,000 bytes of text are found.
    """
    root = Path(path) if path is not None else Path(sysconfig.get_paths()["stdlib"])
    if not root.exists():
        raise FileNotFoundError(f"text must be a file or folder, got {root}")
    files = [root] if root.is_file() else text_files(root)
    train, held_out, used = bytearray(), bytearray(), 0
    for data in _contents(files, limit):
        cut = len(data) - len(data) // HELD_OUT
        train += data[:cut]
        held_out += data[cut:]
        used += 1
    if len(train) + len(held_out) < 2_000:
        raise ValueError(
            f"text must hold at least 2000 bytes, got {len(train) + len(held_out)} from {root}; "
            "name other text with --text"
        )
    name = "the standard library of this Python" if path is None else str(root)
    return Corpus(_tensor(train), _tensor(held_out), name, used)


def _tensor(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


def batch(data: Tensor, rows: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch of one step, a pure function of its arguments.

    Args:
        data: [bytes] uint8.
        rows, length: B and S.
        seed, step: choose the positions.
    Returns: (tokens, targets), each [B, S] int64; targets are tokens one byte later.
    Raises:
        ValueError: when data is not longer than `length`.
    """
    if data.numel() <= length:
        raise ValueError(f"data must be longer than length = {length}, got {data.numel()} bytes")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(data.numel() - length, (rows, 1), generator=generator)
    window = data[starts + torch.arange(length + 1)].long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def decode(tokens: Tensor) -> str:
    """Bytes [S] as text; what is not UTF-8 shows as a replacement mark."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")
