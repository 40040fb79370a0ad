"""The graphs a GPU would get, kernels and all, partitioned without one: what is kept, what runs.

Run as a program (`python -m tests.partitioned 8 streams mhc`): it replaces Triton's driver,
so that CPU tensors are traced as on a device, and nothing runs. Prints one JSON object.
"""

import json
import sys

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

import hc_compile as hc
from hc_compile.passes.recompute import KEY
from profiles import saved
from profiles.stand_in import kernels_without_device
from tests.test_presets import Net, draw

WIDTH, TOKENS = 64, 48


class Done(Exception):
    """The partition is known."""


def kernel_counts(graph):
    """Launches by kernel name."""
    counts = {}
    for node in graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            name = getattr(kernel, "fn", kernel).__name__
            counts[name] = counts.get(name, 0) + 1
    return counts


def main(layers: int, policy: str, preset: str) -> None:
    """Print what a net of bf16 streams keeps and launches under a policy."""
    kernels_without_device()
    net = Net(hc.HCConfig(WIDTH, 4, preset), layers)
    for name, parameter in net.named_parameters():
        if "coefficients" not in name:
            parameter.data = parameter.data.bfloat16()
    x = torch.empty(TOKENS, 4, WIDTH, dtype=torch.bfloat16)
    counted = saved._count

    def count(forward, backward, outputs, streams, found):
        counted(forward, backward, outputs, streams, found)
        kept = found.streams / (x.numel() * x.element_size())
        tensors = forward.graph.find_nodes(op="output")[0].args[0][outputs:]
        bases = [saved._base(node) for node in tensors if isinstance(node, torch.fx.Node)]
        rows = sum("row" in base.meta.get("custom", {}).get(KEY, ()) for base in bases)
        kernels = {
            "forward": kernel_counts(forward.graph),
            "backward": kernel_counts(backward.graph),
        }
        print(json.dumps({"kept": kept, "rows": rows, **kernels}))
        raise Done

    saved._count = count
    forward, _ = saved.saved_by(net, policy, x)
    try:
        forward(draw(TOKENS, WIDTH).bfloat16().requires_grad_())
    except (Done, BackendCompilerFailed) as error:
        if "Done" not in repr(error) + repr(error.__cause__):
            raise


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
