"""Reading traces: hand-made ones with known answers, and one from the profiler."""

import gzip
import json

import pytest
import torch

from profiles.capture import capture, main, resolve
from profiles.trace import category, clean_name, find_trace, read_trace


def span(name, ts, dur, cat="cpu_op", tid=1, **args):
    return dict(ph="X", name=name, ts=ts, dur=dur, cat=cat, pid=1, tid=tid, args=args)


def step(number, ts, dur):
    return span(f"ProfilerStep#{number}", ts, dur, cat="user_annotation")


def memory(ts, total, device=0):
    return dict(
        ph="i", name="[memory]", ts=ts, args={"Total Allocated": total, "Device Type": device}
    )


def write(folder, events, name="host.1.pt.trace.json.gz"):
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / name, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return folder


def test_cpu_trace_counts_leaf_operators_that_compute(tmp_path):
    events = [
        step(1, 0, 100),
        span("aten::linear", 0, 50),
        span("aten::t", 1, 4),
        span("aten::addmm", 10, 30),
        span("aten::copy_", 12, 5),  # belongs to addmm
        span("aten::add", 60, 7),
        span("aten::empty", 61, 2),
        span("aten::add", 60, 3, tid=2),
    ]
    trace = read_trace(write(tmp_path, events))
    assert trace.device == "cpu" and trace.steps == 1 and trace.step_micros == 100
    found = {k.name: (k.calls, k.micros) for k in trace.kernels.values()}
    assert found == {"aten::addmm": (1, 30), "aten::add": (2, 8)}
    assert trace.launches == 3


def test_operators_inside_ours_are_named_after_it(tmp_path):
    events = [step(1, 0, 100), span("hc::sinkhorn", 0, 50), span("aten::div", 10, 20)]
    kernels = read_trace(write(tmp_path, events)).kernels
    assert [(k.name, k.category) for k in kernels.values()] == [
        ("hc::sinkhorn > aten::div", "hyper-connection")
    ]


def test_gpu_trace_counts_kernels_and_launches_per_step(tmp_path):
    events = [
        step(1, 0, 40),
        step(2, 50, 60),
        span("aten::add", 0, 9),
        *(span("cudaLaunchKernel", ts, 1, cat="cuda_runtime") for ts in (2, 52)),
        *(span("cuLaunchKernelEx", ts, 1, cat="cuda_driver") for ts in (4, 54)),
        span("cudaMemcpyAsync", 6, 1, cat="cuda_runtime"),
        *(span("triton_poi_fused_add_0", ts, 10, cat="kernel", tid=7) for ts in (10, 60)),
        *(span("hc_post_kernel", ts, 5, cat="kernel", tid=7) for ts in (30, 80)),
        memory(-1, 100, device=1),
        memory(5, 350, device=1),
        memory(55, 200, device=1),
        memory(6, 9999, device=0),
    ]
    trace = read_trace(write(tmp_path, events))
    assert trace.device == "cuda" and trace.steps == 2
    assert trace.launches == 2 and trace.busy_micros == 15 and trace.step_micros == 50
    assert trace.by_category() == {"inductor": (1, 10), "hyper-connection": (1, 5)}
    assert trace.peak_bytes == 250


def test_memory_is_the_growth_above_the_steps_start(tmp_path):
    events = [step(1, 10, 10), memory(5, 70), memory(12, 300), memory(14, 90), memory(30, 900)]
    assert read_trace(write(tmp_path, events)).peak_bytes == 230
    assert read_trace(write(tmp_path / "none", [step(1, 0, 5)])).peak_bytes is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hc_post_pre_kernel", "hyper-connection"),
        ("hc::sinkhorn_loop", "hyper-connection"),
        ("triton_red_fused_mean", "inductor"),
        ("cpp_fused_add_mul", "inductor"),
        ("aten::mm", "matmul"),
        ("nvjet_hsh_128x256_64x4", "matmul"),
        ("sm90_xmma_gemm_bf16", "matmul"),
        ("flash_fwd_kernel", "attention"),
        ("Memcpy HtoD (Pageable -> Device)", "copy"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::div", "other"),
    ],
)
def test_categories(name, expected):
    assert category(name) == expected


def test_names_lose_the_numbers_of_their_graph():
    assert clean_name("graph_3_cpp_fused_add_mul_12") == "cpp_fused_add_mul"
    assert clean_name("triton_poi_fused_add_7") == "triton_poi_fused_add"
    assert clean_name("nvjet_128x64_2") == "nvjet_128x64_2"


def test_find_trace_takes_the_newest_and_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a trace or hold"):
        find_trace(tmp_path)
    write(tmp_path, [], "a.1.pt.trace.json.gz")
    assert find_trace(tmp_path).name == "a.1.pt.trace.json.gz"
    assert find_trace(find_trace(tmp_path)) == find_trace(tmp_path)


def square():
    x = torch.ones(64, 64, requires_grad=True)
    (x @ x).sum().backward()


def test_capture_leaves_one_trace_and_counts_it(tmp_path):
    for _ in range(2):
        trace = capture(square, tmp_path, steps=2)
    assert len(list(tmp_path.iterdir())) == 1
    assert trace.steps == 2
    assert trace.kernels["aten::mm"].calls == 2 * 3  # x @ x and two gradients
    assert trace.peak_bytes is not None and trace.peak_bytes >= 3 * 64 * 64 * 4


def test_capture_command(tmp_path, capsys):
    main(["tests.profiles.test_trace:square", "--out", str(tmp_path), "--steps", "1"])
    assert "aten::mm" in capsys.readouterr().out
    with pytest.raises(ValueError, match="target must be"):
        resolve("oops")
    with pytest.raises(ValueError, match="steps must be >= 1"):
        capture(square, tmp_path, steps=0)
