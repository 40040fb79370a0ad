"""What the benchmarks share: options of a recorded run, its first lines, and how it is shown."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from profiles.machine import describe, recorded_command


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The parser's own options and those of every benchmark."""
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--commit", help="to record where the code lies outside git")
    parser.add_argument("--json", type=Path, help="write the run here")
    parser.add_argument("--render", type=Path, help="print a recorded run's tables and stop")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def header(kind: str, args: argparse.Namespace, argv: list[str]) -> dict:
    """What a record says before any figure; `kind` is also the script's name."""
    machine = describe(args.device) | ({"git_commit": args.commit} if args.commit else {})
    command = recorded_command(f"scripts.{kind}", argv)
    return {"kind": kind, "command": command, "machine": machine}


def main(
    argv: list[str] | None,
    options: Callable[[list[str]], argparse.Namespace],
    run: Callable[[argparse.Namespace, list[str]], dict],
    render: Callable[[dict], str],
) -> None:
    """A benchmark's command line: show a recorded run, or make one; its last line is JSON."""
    argv = sys.argv[1:] if argv is None else argv
    args = options(argv)
    if args.render:
        print(render(json.loads(args.render.read_text())))
        return
    data = run(args, argv)
    print(render(data))
    print(json.dumps(data))
