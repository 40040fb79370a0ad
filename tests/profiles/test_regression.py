"""What counts as worse between two records."""

import copy

import pytest

from profiles.regression import compare


def path(step, launches=100.0, peak=1000, seconds=5.0, breaks=0, recompiles=0):
    return {
        "step_ms": step,
        "launches": launches,
        "peak_bytes": peak,
        "compile": {"seconds": seconds, "graph_breaks": breaks, "recompiles": recompiles},
        "trace": {"device": "cpu"},
        "floor": None,
    }


@pytest.fixture
def old():
    versions = {"torch": "2.13.0"}
    machine = {"hardware": "A", "device": "cpu", "system": "Linux", "versions": versions}
    return {
        "kind": "profile_paths",
        "machine": machine,
        "workload": {"model": "Net", "dim": 8},
        "paths": {"eager": path(100.0), "fused": path(40.0)},
    }


def worse(found):
    return {(c["path"], c["measure"]) for c in found["checks"] if c["verdict"] == "regressed"}


def test_a_run_does_not_regress_against_itself(old):
    found = compare(old, copy.deepcopy(old), "old.json")
    assert found["regressed"] == 0 and len(found["checks"]) == 12
    assert {c["verdict"] for c in found["checks"]} == {"same"}


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"step": 45.0}, "step ms"),
        ({"launches": 120.0}, "launches"),
        ({"peak": 1200}, "peak MiB"),
        ({"seconds": 6.0}, "compile s"),
        ({"breaks": 1}, "graph breaks"),
        ({"recompiles": 1}, "recompiles"),
    ],
)
def test_each_figure_on_the_same_machine(old, change, measure):
    new = copy.deepcopy(old)
    new["paths"]["fused"] = path(**{"step": 40.0, **change})
    found = compare(old, new, "old.json")
    assert worse(found) == {("fused", measure)} and found["regressed"] == 1
    back = compare(new, old, "new.json")
    assert back["regressed"] == 0
    assert sum(c["verdict"] == "improved" for c in back["checks"]) == 1


def test_the_threshold_decides(old):
    new = copy.deepcopy(old)
    new["paths"]["fused"]["step_ms"] = 45.0
    assert compare(old, new, "x", threshold=0.2)["regressed"] == 0
    assert compare(old, new, "x", threshold=0.1)["regressed"] == 1
    with pytest.raises(ValueError, match="threshold must be > 0"):
        compare(old, new, "x", threshold=0)


def test_another_machine_compares_ratios_alone(old):
    new = copy.deepcopy(old)
    new["machine"]["hardware"] = "B"
    new["paths"] = {"eager": path(10.0, seconds=50.0), "fused": path(4.1, seconds=90.0)}
    found = compare(old, new, "old.json")
    assert found["regressed"] == 0 and "Another machine" in found["basis"]
    assert not {"step ms", "compile s", "peak MiB"} & {c["measure"] for c in found["checks"]}
    new["paths"]["fused"] = path(6.0)
    assert worse(compare(old, new, "old.json")) == {("fused", "step ms ÷ eager")}


def test_kernels_of_a_gpu_against_their_floor(old):
    new = copy.deepcopy(old)
    old["paths"]["fused"]["floor"] = {"trace_x_floor": 1.2}
    new["paths"]["fused"]["floor"] = {"trace_x_floor": 1.5}
    assert worse(compare(old, new, "old.json")) == {("fused", "hc_ kernels × floor")}


def test_what_is_not_compared_is_said(old):
    new = copy.deepcopy(old)
    new["paths"]["custom-op"] = new["paths"].pop("fused")
    new["machine"]["versions"] = {"torch": "2.14.0"}
    found = compare(old, new, "old.json")
    assert set(found["notes"]) == {
        "fused is only in the old run",
        "custom-op is only in this run",
        "torch 2.13.0 before, 2.14.0 now",
    }


def test_other_work_is_refused(old):
    new = copy.deepcopy(old)
    new["workload"]["dim"] = 16
    with pytest.raises(ValueError, match="of the same work, got another dim"):
        compare(old, new, "old.json")
    with pytest.raises(ValueError, match="kind profile_paths, got None"):
        compare({}, new, "old.json")
