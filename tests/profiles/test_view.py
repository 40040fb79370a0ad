"""The category fix for torch-tb-profiler, on a trace as today's profiler writes it."""

import json

import pytest
from torch_tb_profiler.profiler.data import RunProfileData
from torch_tb_profiler.profiler.trace import EventTypeMap

from profiles.capture import capture
from profiles.view import NEW_RUNTIME_CATEGORIES, teach_runtime_categories
from tests.profiles.test_trace import span, square, step


@pytest.fixture
def unpatched(monkeypatch):
    """A map without the fix, restored afterwards."""
    for name in NEW_RUNTIME_CATEGORIES:
        monkeypatch.delitem(EventTypeMap, name, raising=False)
    monkeypatch.setenv("TORCH_PROFILER_START_METHOD", "spawn")


def gpu_trace(tmp_path):
    """One operator that launches one kernel, linked by their correlation number."""
    events = [
        step(1, 0, 100),
        span("aten::add", 5, 20, **{"External id": 9}),
        span("cudaLaunchKernel", 8, 4, "cuda_runtime", **{"External id": 9, "correlation": 3}),
        span(
            "add_kernel", 30, 10, "kernel", 7, **{"External id": 9, "correlation": 3, "device": 0}
        ),
    ]
    file = tmp_path / "host_1.1.pt.trace.json"
    file.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return RunProfileData.parse("host_1", "1", str(file), str(tmp_path))


def kernel_time_of_add(data):
    return next(op.device_duration for op in data.op_list_groupby_name if op.name == "aten::add")


def test_without_the_fix_kernels_do_not_attach(tmp_path, unpatched):
    assert kernel_time_of_add(gpu_trace(tmp_path)) == 0


def test_with_the_fix_the_operator_owns_its_kernel(tmp_path, unpatched):
    teach_runtime_categories()
    assert kernel_time_of_add(gpu_trace(tmp_path)) == 10


def test_a_captured_trace_opens(tmp_path):
    teach_runtime_categories()
    trace = capture(square, tmp_path, steps=2)
    data = RunProfileData.parse("host_1", "1", trace.path, str(tmp_path))
    assert data.steps_names == ["1", "2"]
    assert "aten::mm" in {op.name for op in data.op_list_groupby_name}
