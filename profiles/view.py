"""Open TensorBoard's profiler page with kernels attached to their operators.

    python -m profiles.view                 # shows profiles/out
    python -m profiles.view --logdir DIR    # further arguments go to TensorBoard

torch-tb-profiler 0.4.3 attaches a kernel to its operator through the runtime call that launched
it, but it knows that call's category as "runtime"; today's profiler writes "cuda_runtime" and
"cuda_driver". Plain `tensorboard --logdir profiles/out` opens the traces too, without that link.
"""

from __future__ import annotations

import os
import sys

NEW_RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")


def teach_runtime_categories() -> None:
    """Let torch-tb-profiler read today's launch events as runtime calls; safe to repeat.

    Traces are parsed in child processes, which must be forked to inherit this.
    """
    os.environ["TORCH_PROFILER_START_METHOD"] = "fork"
    from torch_tb_profiler.profiler.trace import EventTypeMap, EventTypes

    for name in NEW_RUNTIME_CATEGORIES:
        EventTypeMap[name] = EventTypes.RUNTIME


def main() -> None:
    """Start TensorBoard in this process."""
    teach_runtime_categories()
    from tensorboard import main as tensorboard

    if not any(argument.startswith("--logdir") for argument in sys.argv[1:]):
        sys.argv += ["--logdir", "profiles/out"]
    sys.exit(tensorboard.run_main())


if __name__ == "__main__":
    main()
