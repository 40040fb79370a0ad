"""What the tests of saved models run in a process of its own; prints one JSON object.

`python -m tests.away compile FILE MODE` compiles a model and saves the compiler's artefacts,
`... reuse FILE MODE` loads them first; MODE is "infer" or "train". `... exported FILE TOKENS` runs
a torch.export program. Each prints its result and what the caches did.
"""

import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

import hc_compile as hc
from tests.test_presets import Net, draw

STREAMS, WIDTH = 2, 16


def model():
    """A net whose coefficients depend on the tokens."""
    net = Net(hc.HCConfig(WIDTH, STREAMS, "mhc", iterations=2), layers=2)
    with torch.no_grad():
        for p in net.connections.parameters():
            p.add_(0.3 * draw(*p.shape, seed=p.numel()))
    return net


def compiled(file: Path, reuse: bool, train: bool) -> dict:
    """The compiled model's results, its artefacts loaded before or saved after."""
    if reuse:
        torch.compiler.load_cache_artifacts(file.read_bytes())
    net, h = model(), draw(5, WIDTH).requires_grad_(train)
    with torch.set_grad_enabled(train):
        out = hc.compile(net, recompute="streams")(h)
    grads = torch.autograd.grad(out, h, draw(5, WIDTH, seed=1)) if train else ()
    if not reuse:
        artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        file.write_bytes(artifacts[0])
    found = {name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss")}
    generated = counters["inductor"]["fxgraph_cache_miss"]
    return found | {"generated": generated, "out": [t.tolist() for t in (out, *grads)]}


def exported(file: Path, rows: int) -> dict:
    """A saved program on other numbers of tokens than it was exported with."""
    program = torch.export.load(file).module()
    with torch.no_grad():
        return {"out": program(draw(rows, WIDTH)).tolist()}


if __name__ == "__main__":
    command, path, *rest = sys.argv[1:]
    if command == "exported":
        print(json.dumps(exported(Path(path), int(rest[0]))))
    else:
        print(json.dumps(compiled(Path(path), command == "reuse", rest[0] == "train")))
