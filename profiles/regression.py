"""Compare two records of `profiles.paths`: what got worse.

On the same machine times, memory and counts are compared as they are. On another machine times
and memory become ratios to the first path of their own run; counts stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]
COUNTS = {"graph breaks": "graph_breaks", "recompiles": "recompiles"}


def same_machine(old: Record, new: Record) -> bool:
    """Whether times of two runs compare: same hardware and kind of device."""
    keys = ("hardware", "device", "system")
    return all(old["machine"][key] == new["machine"][key] for key in keys)


def compare(old: Record, new: Record, against: str, threshold: float = 0.1) -> dict[str, Any]:
    """What changed from one run to a later one of the same work.

    Args:
        old, new: records of `profiles.paths.profile_workload`.
        against: what to call the old one.
        threshold: growth of a figure that counts as a regression, > 0; of graph breaks and
            recompilations any growth does.
    Returns: plain data with `checks` (path, measure, old, new, change, verdict), `regressed`
        (how many) and `notes` on what was not compared.
    Raises:
        ValueError: when the runs are of different work, or threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be > 0, got {threshold}")
    if old.get("kind") != new["kind"]:
        raise ValueError(
            f"{against} must be a record of kind {new['kind']}, got {old.get('kind')}"
        )
    if old["workload"] != new["workload"]:
        keys = {**old["workload"], **new["workload"]}
        differ = [k for k in keys if old["workload"].get(k) != new["workload"].get(k)]
        raise ValueError(f"{against} must be of the same work, got another {', '.join(differ)}")
    same = same_machine(old, new)
    checks = [
        {"path": path, "measure": measure, "old": a, "new": b}
        | {"change": change, "verdict": verdict(change, 0.0 if measure in COUNTS else threshold)}
        for path, measure, a, b in figures(old, new, same)
        for change in [(b - a) / a if a else float(b - a)]
    ]
    worse = sum(check["verdict"] == "regressed" for check in checks)
    return {
        "against": against,
        "basis": (
            "The same machine: times as they are."
            if same
            else "Another machine: times and memory relative to the first path of each run."
        ),
        "threshold": threshold,
        "regressed": worse,
        "result": f"{worse} of {len(checks)} figures regressed by more than {threshold:.0%}",
        "notes": list(missing(old, new)),
        "checks": checks,
    }


def verdict(change: float, threshold: float) -> str:
    """Every figure is better when smaller."""
    return "regressed" if change > threshold else "improved" if change < -threshold else "same"


def missing(old: Record, new: Record) -> Iterator[str]:
    """Paths that only one run has, and a change of torch."""
    for name in old["paths"].keys() ^ new["paths"].keys():
        yield f"{name} is only in {'the old' if name in old['paths'] else 'this'} run"
    versions = [record["machine"]["versions"]["torch"] for record in (old, new)]
    if versions[0] != versions[1]:
        yield f"torch {versions[0]} before, {versions[1]} now"


def figures(old: Record, new: Record, same: bool) -> Iterator[tuple[str, str, float, float]]:
    """(path, measure, old value, new value) of everything that can be compared."""
    first = next(iter(new["paths"]))
    base = (old["paths"].get(first), new["paths"][first])
    for name, after in new["paths"].items():
        before = old["paths"].get(name)
        if before is None:
            continue
        for measure, key in (("step ms", "step_ms"), ("peak MiB", "peak_bytes")):
            pair = before[key], after[key]
            if None in pair:
                continue
            if same:
                scale = 2**20 if key == "peak_bytes" else 1
                yield name, measure, pair[0] / scale, pair[1] / scale
            elif name != first and base[0] is not None and base[0][key] and base[1][key]:
                yield name, f"{measure} ÷ {first}", pair[0] / base[0][key], pair[1] / base[1][key]
        yield from counts(name, before, after, same)


def counts(
    name: str, before: Record, after: Record, same: bool
) -> Iterator[tuple[str, str, float, float]]:
    """Launches where the devices are alike, compile time on one machine, breaks, recompiles."""
    if before["trace"]["device"] == after["trace"]["device"]:
        yield name, "launches", before["launches"], after["launches"]
    seconds = before["compile"]["seconds"], after["compile"]["seconds"]
    if same and None not in seconds:
        yield name, "compile s", *seconds
    for measure, key in COUNTS.items():
        yield name, measure, before["compile"][key], after["compile"][key]
    was, now = ((path["floor"] or {}).get("trace_x_floor") for path in (before, after))
    if was is not None and now is not None:
        yield name, "hc_ kernels × floor", was, now
