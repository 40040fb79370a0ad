"""Which hc:: ops a step calls, what they must move, and sharing a trace's kernels out."""

from dataclasses import replace

import pytest
import torch

import hc_compile as hc
from custom_ops.catalog import ROWS, make_inputs
from hc_compile.models import Transformer, TransformerConfig
from profiles.catalog_bench import variant_of
from profiles.op_floor import (
    OpRecorder,
    mandatory_bytes,
    merge,
    op_rows,
    record_ops,
    share_trace,
    summary,
)
from profiles.workload import Workload
from tests.profiles.test_compare import trace

T, N, C = 6, 3, 8


def tiny(layers=2):
    torch.manual_seed(0)
    cfg = TransformerConfig(
        dim=C,
        layers=layers,
        heads=2,
        ffn_dim=16,
        max_seq_len=T,
        hc=hc.HCConfig(C, N, "mhc", iterations=2),
    )
    return Workload(Transformer(cfg), (torch.randint(256, (1, T)),))


def counts(calls):
    found = {}
    for call in calls:
        found[call.name] = found.get(call.name, 0) + call.calls
    return found


def test_ops_as_written_and_after_the_passes():
    work = tiny()
    written = counts(record_ops(work, passes=False))
    both = dict.fromkeys(("pre", "pre_backward", "post", "post_backward"), 4)
    assert written == {f"hc::{name}": number for name, number in both.items()}
    fused = counts(record_ops(work, passes=True))
    assert fused["hc::post_pre"] == fused["hc::post_pre_backward"] == 3  # every seam
    assert "hc::pre" not in fused  # the first sublayer reads one stream, the last writes none


def recorded(row, variant=None):
    """The calls of a row's op and of its backward."""
    variant = variant or variant_of(row)
    inputs = [t.requires_grad_() for t in make_inputs(row, variant, T, N, C)]
    with OpRecorder() as recorder:
        outputs = [o for o in row.call(variant, *inputs) if o.requires_grad]
        torch.autograd.grad(outputs, inputs, list(map(torch.ones_like, outputs)))
    return list(recorder.found.values())


@pytest.mark.parametrize("row", [r for r in ROWS if r.units], ids=lambda row: row.name)
def test_bytes_are_the_catalogs(row):
    forward, backward = recorded(row)
    for call, units in zip((forward, backward), row.units(N), strict=True):
        assert mandatory_bytes(call) == (units, units * T * C * 4, "catalog")


@pytest.mark.parametrize("row", [r for r in ROWS if r.delayed_units], ids=lambda row: row.name)
def test_a_carried_read_has_its_own_floor(row):
    forward, backward = recorded(row, "delayed")
    for call, units in zip((forward, backward), row.delayed_units(N), strict=True):
        assert mandatory_bytes(call) == (units, units * T * C * 4, "catalog")
    assert mandatory_bytes(forward)[0] < row.units(N)[0]


def test_an_op_without_streams_uses_its_tensors_once():
    row = next(row for row in ROWS if row.name == "sinkhorn")
    forward = recorded(row)[0]
    size = sum(t.numel() * 4 for t in (*forward.args, forward.output) if torch.is_tensor(t))
    assert mandatory_bytes(forward) == (None, size, "tensors in and out")


def test_bytes_of_a_backward_that_leaves_dx_out_or_adds_a_cotangent():
    post = recorded(next(row for row in ROWS if row.name == "post"))[1]
    without = replace(post, args=(*post.args[:-1], False))
    assert mandatory_bytes(post)[0] - mandatory_bytes(without)[0] == N
    pre = recorded(next(row for row in ROWS if row.name == "pre"))[1]
    streams = pre.named["x"]
    more = replace(pre, args=(*pre.args[:4], torch.ones_like(streams), *pre.args[5:]))
    assert mandatory_bytes(more)[0] - mandatory_bytes(pre)[0] == N


def test_streams_made_of_one_are_not_the_catalogs():
    x, y = torch.ones(T, 1, C), torch.ones(T, C)
    with OpRecorder() as recorder:
        torch.ops.hc.post(x, y, torch.ones(T, N), torch.ones(T, N, 1))
    (call,) = recorder.found.values()
    size = 4 * (x.numel() + y.numel() + 2 * T * N + T * N * C)
    assert mandatory_bytes(call) == (None, size, "tensors in and out")


def test_rows_relate_time_bytes_and_bandwidth():
    rows = op_rows(record_ops(tiny(1), passes=False), "cpu", bandwidth=1e9)
    assert {row["op"] for row in rows} == {
        f"hc::{name}" for name in ("pre", "pre_backward", "post", "post_backward")
    }
    for row in rows:
        assert row["calls"] == 2 and row["kernels"] == {}
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["x_floor"] == pytest.approx(row["ms"] * 1e-3 * 1e9 / row["bytes"])
    whole = summary(rows, replace(trace(), device="cpu"), 1e9)
    assert whole["floor_ms"] == pytest.approx(sum(2 * row["bytes"] for row in rows) / 1e6)
    assert whole["trace_ms"] is None and whole["trace_x_floor"] is None


def row(op, calls, size, **kernels):
    return {"op": op, "calls": calls, "bytes": size, "ms": 1.0, "kernels": kernels}


def test_a_traces_kernels_are_shared_out_by_time_alone():
    rows = [
        row("a", 2, 4000, hc_own=5.0, hc_shared=10.0),
        row("b", 1, 8000, hc_shared=20.0),
        row("c", 1, 8000, hc_gone=1.0),
    ]
    found = trace(steps=2, hc_own=(4, 40.0), hc_shared=(6, 120.0), gemm=(1, 9.0))
    share_trace(rows, found, bandwidth=1e9)
    # a: 20 µs of its own and half of 60 µs a step (2 × 10 : 1 × 20), over two calls
    assert rows[0]["trace_ms"] == pytest.approx((20 + 30) / 2 / 1e3)
    assert rows[0]["trace_x_floor"] == pytest.approx(25 / 4)
    assert rows[1]["trace_ms"] == pytest.approx(30 / 1e3)
    assert rows[2]["trace_ms"] is None and rows[2]["trace_x_floor"] is None
    whole = summary(rows, found, bandwidth=1e9)
    assert whole["trace_ms"] == pytest.approx(0.08)  # every hc_ kernel, and no gemm
    assert whole["trace_x_floor"] == pytest.approx(80 / 24)


def test_merged_rows_are_means_by_calls():
    a, b = row("a", 3, 8, hc_x=4.0), {**row("a", 1, 8, hc_x=8.0, hc_y=4.0), "ms": 5.0}
    merge(a, b)
    assert (a["calls"], a["ms"], a["kernels"]) == (4, 2.0, {"hc_x": 5.0, "hc_y": 1.0})
