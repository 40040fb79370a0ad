"""Small records with known numbers, as `profiles.paths.profile_workload` makes them."""

from dataclasses import replace

from profiles.path_run import PATHS, time_record
from tests.profiles.test_compare import trace

KERNELS = {
    "eager": {"aten::mul": (40, 900.0), "aten::mm": (6, 300.0), "aten::copy_": (5, 20.0)},
    "compiled": {"cpp_fused_add_mul": (4, 200.0), "aten::mm": (6, 310.0)},
    "custom-op": {"hc::sinkhorn_loop > aten::div": (9, 80.0), "aten::mm": (6, 290.0)},
    "fused": {"hc::sinkhorn_loop > aten::div": (5, 50.0), "aten::mm": (3, 280.0)},
}
GPU_KERNELS = {
    "eager": {"vectorized_elementwise_kernel": (40, 900.0), "nvjet_128": (6, 300.0)},
    "fused": {"hc_post_pre": (4, 120.0), "triton_poi_fused_add": (4, 30.0), "nvjet_128": (6, 290)},
}


def op(name, ms, gpu, shape=(64, 4, 8), source="catalog"):
    row = {"op": name, "calls": 2, "shape": list(shape) if shape else None, "ms": ms}
    row |= {"units": 9 if source == "catalog" else None, "bytes": 4096, "bytes_from": source}
    row |= {"gb_per_s": 4096 / ms / 1e6, "x_floor": ms / 0.01, "kernels": {}}
    shared = {"trace_ms": ms, "trace_x_floor": ms / 0.01} if gpu else {}
    return row | {"trace_ms": None, "trace_x_floor": None} | shared


def path(name, kernels, gpu):
    made = trace(steps=2, **kernels)
    made = replace(made, path=f"out/{name}/x.json", device="cuda" if gpu else "cpu")
    made = replace(made, step_micros=3 * made.busy_micros)
    compiled = name != "eager"
    ops = []
    if PATHS[name].ops in ("as written", "after passes"):
        ops = [op("hc::post_pre", 0.04, gpu), op("hc::constrain", 0.02, gpu, None, "in and out")]
    floor = {"floor_ms": 0.02, "alone_ms": 0.12, "alone_x_floor": 6.0}
    floor |= {"trace_ms": 0.06 if gpu else None, "trace_x_floor": 3.0 if gpu else None}
    step_ms = 2.5 * made.busy_micros / 1e3
    return {
        "what": PATHS[name].what.format(plain="the plain functions"),
        "step_ms": step_ms,
        "steps_ms": [step_ms],
        "peak_bytes": 3 * 2**20,
        "resident_bytes": 2**20,
        "compile": {
            "seconds": 4.5 if compiled else None,
            "graphs": int(compiled),
            "graph_breaks": int(compiled),
            "graph_break_reasons": {"<script>print</script>": 1} if compiled else {},
            "recompiles": 0,
            "recompile_reasons": [],
            "phases": dict.fromkeys(("dynamo", "aot", "inductor", "kernels"), float(compiled)),
        },
        "memory_curve": [[0.0, 0.0], [50.0, 2.0**20 + len(name) * 1e5], [100.0, 0.0]],
        **time_record(made, step_ms),
        "trace": made.to_json(),
        "output_difference": 0.0 if name == "eager" else 3e-7,
        "gradient_difference": None,
        "ops": ops,
        "floor": floor if ops else None,
    }


def record(gpu=False):
    """A record of every path without a GPU, or of two with one."""
    kernels = GPU_KERNELS if gpu else KERNELS
    versions = {"python": "3.11", "torch": "2.13.0", "triton": "3.7.1", "numpy": "2"}
    machine = {"hardware": "4 CPU cores (Some <CPU>)", "device": "cpu", "system": "Linux"}
    return {
        "kind": "profile_paths",
        "machine": machine
        | {"versions": versions, "cuda": None, "date": "2026-01-01", "git_commit": "abc"},
        "workload": {"model": "Net", "parameters": 1234, "inputs": ["int64 [8, 128]"]}
        | {"loss": "given", "optimizer": "none"},
        "settings": {"steps": 20, "traced": 2, "threads": 1},
        "copy_gb_per_s": 42.5,
        "notes": ["fused-recompute is left out: for a test"],
        "paths": {name: path(name, table, gpu) for name, table in kernels.items()},
    }
