"""The Dynamo backend "hc_inductor": Inductor with the passes over hc:: ops before autograd.

`torch.compile(model, backend="hc_inductor", mode=..., options=...)` finds it without any import
(entry point group `torch_dynamo_backends`); `hc.compile(model, ...)` is the same thing. After one
`hc.install()` plain `torch.compile(model)` runs the passes too.

The backend also keeps longer rows on chip than Inductor does (row_reductions.py), which `install`
cannot ask of it, and recomputes by a policy. Inductor's own options stay as they are. Among them
`triton.mix_order_reduction`, on by default, gives wrong gradients on torch 2.10 to 2.13 where a
sum over 4096 or more tokens lands in a slice of a `cat` (pytorch/pytorch#193061: modulation
vectors chunked from one shared table). No graph of ours has such a sum, which a test holds; a
model that has one needs `options={"triton.mix_order_reduction": False}` here as under plain
torch.compile.

Models that leave this process:

    program = torch.export.export(model.eval(), (h,), dynamic_shapes=...)   # keeps the hc:: ops
    hc.install()                            # the passes then run in AOTInductor, too
    torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")

A saved program needs `import hc_compile` where it is loaded, for the ops; a package needs neither
this project nor Python: the loops of Sinkhorn and Newton–Schulz, one call each under
torch.compile on a CPU, are inlined in it. `torch.compiler.save_cache_artifacts()` after
`hc.compile(model)` spares other processes of the same machine all tracing by AOTAutograd and all
code generation. Exported programs are for inference, and double backward is for eager code.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import custom_ops  # noqa: F401  (registers torch.ops.hc)
from hc_compile.passes import PASSES, GraphPass, PassPipeline, without_pipeline
from hc_compile.passes.recompute import Recompute, annotate
from hc_compile.recompute import Policy, check_policy
from hc_compile.row_reductions import with_rows_on_chip


def hc_inductor(
    graph_module: torch.fx.GraphModule,
    example_inputs: list,
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    recompute: Policy = "none",
) -> Any:
    """Compile with Inductor, hc:: passes first; a user's pre-grad or joint pass runs after ours.

    Args:
        graph_module, example_inputs: from Dynamo.
        mode: as torch.compile's ("reduce-overhead", "max-autotune", ...).
        options: Inductor options, as torch.compile's, and `recompute`.
        recompute: what of the streams is kept for the backward, see hc_compile/recompute.py.
    """
    options = dict(options or {})
    recompute = options.pop("recompute", recompute)
    check_policy(recompute)
    then = options.pop("pre_grad_custom_pass", inductor_config.pre_grad_custom_pass)
    passes = PassPipeline((*PASSES, annotate), without_pipeline(then))
    then = options.pop("joint_custom_post_pass", inductor_config.joint_custom_post_pass)
    options |= {
        "pre_grad_custom_pass": passes,
        "joint_custom_post_pass": Recompute(recompute, without_pipeline(then)),
    }
    options = torch._TorchCompileInductorWrapper(mode, options, None).config
    inner = with_rows_on_chip(compile_fx_inner)
    return compile_fx(graph_module, example_inputs, inner, config_patches=options)


def _reset() -> None:
    """Called by torch.compiler.reset(): drop CUDA graphs."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    if torch.cuda.is_available():
        reset_cudagraph_trees()


hc_inductor.reset = _reset  # type: ignore[attr-defined]


def compile(
    model: Callable | None = None, *, recompute: Policy = "none", **kwargs: Any
) -> Callable:
    """`torch.compile` with the hc:: graph passes.

    Args:
        model: a module or function; without it, a decorator is returned, as by torch.compile.
        recompute: "none", "coefficients", "streams" or the bytes that a graph's streams may take
            between forward and backward, see hc_compile/recompute.py.
        **kwargs: of torch.compile (fullgraph, dynamic, mode, options, ...), except `backend`.
    Raises: TypeError, ValueError that name the argument; a number of bytes that is too small for
        a graph is refused when the graph is compiled.
    """
    return torch.compile(model, backend=backend_for(recompute, kwargs), **kwargs)  # type: ignore[arg-type]


def backend_for(recompute: Policy, kwargs: dict[str, Any]) -> Callable:
    """`hc_inductor` with a policy, for options of torch.compile that leave the backend open."""
    if "backend" in kwargs:
        raise TypeError(f"backend must not be given, it is ours, got {kwargs['backend']!r}")
    check_policy(recompute)
    if recompute == "none":
        return hc_inductor
    backend = partial(hc_inductor, recompute=recompute)
    backend.reset = _reset  # type: ignore[attr-defined]
    return backend


def install(passes: Sequence[GraphPass] = PASSES) -> None:
    """Make plain `torch.compile(model)` run the hc:: graph passes, until `uninstall`.

    Sets `torch._inductor.config.pre_grad_custom_pass` to the passes followed by what it held, so a
    pass of the user's keeps running; one given later, there or in `options=`, replaces ours.
    Likewise `joint_custom_post_pass`, to what hc_compile/passes/recompute.py keeps without a
    policy. From torch 2.13 that configuration belongs to the thread that sets it. Graphs without
    hc:: ops are left alone and functions compiled before keep what they have. Calling it again
    changes nothing but the choice of passes.

    Args:
        passes: which of `hc_compile.passes.PASSES` to run, in order.
    """
    uninstall()
    pipeline = PassPipeline((*passes, annotate), inductor_config.pre_grad_custom_pass)
    inductor_config.pre_grad_custom_pass = pipeline
    kept = Recompute("none", inductor_config.joint_custom_post_pass)
    inductor_config.joint_custom_post_pass = kept


def uninstall() -> None:
    """Undo `install`; passes of the user's stay."""
    for name in ("pre_grad_custom_pass", "joint_custom_post_pass"):
        setattr(inductor_config, name, without_pipeline(getattr(inductor_config, name)))
