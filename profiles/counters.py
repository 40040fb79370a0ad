"""Hardware counters of kernels, by Nsight Compute (ncu): its command line, and its CSV read.

The program switches the profiler on around what matters and names it by an NVTX range, a `label`;
ncu repeats every kernel inside as often as its counters need, alone and with emptied caches.
"""

from __future__ import annotations

import csv
import glob
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from profiles.sublayer import Shape
from profiles.timing import Call

# Sections rather than metrics: ncu leaves out what a chip lacks, an unknown metric would end it.
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
    "SchedulerStats",
    "InstructionStats",
    "ComputeWorkloadAnalysis",
)
PLACES = ("/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")
SECTOR = 32  # bytes
STALLS_KEPT = 5
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
LABEL = re.compile(r"HC\|([^|]*)\|([^|]*)\|(\d+)x(\d+)x(\d+)\|")


@dataclass(frozen=True)
class Metric:
    """A figure of a kernel: the sum of ncu's metrics of these names, times a factor."""

    names: tuple[str, ...]
    factor: float = 1


def metric(*names: str, factor: float = 1) -> Metric:
    """A row of the table below."""
    return Metric(names, factor)


CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_{}.sum"
METRICS = {
    "micros": metric("gpu__time_duration.sum", factor=1e-3),
    "registers": metric("launch__registers_per_thread"),
    "threads": metric("launch__block_size"),
    "programs": metric("launch__grid_size"),
    "waves": metric("launch__waves_per_multiprocessor"),
    "shared_bytes": metric("launch__shared_mem_per_block"),
    "warps_percent": metric("sm__warps_active.avg.pct_of_peak_sustained_active"),
    "dram_read_bytes": metric("dram__bytes_read.sum"),
    "dram_write_bytes": metric("dram__bytes_write.sum"),
    "dram_percent": metric("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"),
    # what loads bring from L2 to the SMs
    "l2_read_bytes": metric("l1tex__m_xbar2l1tex_read_sectors_mem_lg_op_ld.sum", factor=SECTOR),
    "l2_percent": metric("lts__throughput.avg.pct_of_peak_sustained_elapsed"),
    "l2_hit_percent": metric("lts__t_sector_hit_rate.pct"),
    "l1_percent": metric("l1tex__throughput.avg.pct_of_peak_sustained_active"),
    "issue_percent": metric("smsp__issue_active.avg.pct_of_peak_sustained_active"),
    "instructions": metric("smsp__inst_executed.sum"),
    "shared_conflicts": metric(*(CONFLICTS.format(op) for op in ("ld", "st", "ldgsts"))),
    "spills": metric(
        "smsp__sass_inst_executed_op_local_ld.sum", "smsp__sass_inst_executed_op_local_st.sum"
    ),
}


def find_ncu() -> str:
    """Where ncu is: on PATH, else the newest of the usual places.

    Raises:
        FileNotFoundError: when it is in none of them.
    """
    if on_path := shutil.which("ncu"):
        return on_path
    found = [file for place in PLACES for file in glob.glob(place)]
    if not found:
        raise FileNotFoundError(
            f"Nsight Compute's ncu must be on PATH or at {' or '.join(PLACES)}, found none"
        )
    return max(found, key=lambda file: [int(part) for part in re.findall(r"\d+", file)])


def ncu_version(ncu: str) -> str:
    """The version that ncu states, "unknown" where it states none."""
    done = subprocess.run([ncu, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"Version (\S+)", done.stdout)
    return version[1] if version else "unknown"


def ncu_command(ncu: str, log: Path, child: Sequence[str]) -> list[str]:
    """The command that runs `child` under ncu and leaves its CSV, among messages, in `log`."""
    command = [ncu, "--nvtx", "--kernel-name", "regex:hc_", "--clock-control", "none"]
    command += ["--target-processes", "application-only", "--profile-from-start", "off"]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    return [*command, *child]


def count(op: str, direction: str, shape: Shape, call: Call) -> None:
    """Call once to compile, then once more with the profiler on, in a range that names it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    torch.cuda.nvtx.range_push(label(op, direction, shape))
    call()
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_pop()
    torch.cuda.cudart().cudaProfilerStop()


def label(op: str, direction: str, shape: Shape) -> str:
    """The name of the range that `read` finds a kernel's op by."""
    return f"HC|{op}|{direction}|{shape.tokens}x{shape.width}x{shape.streams}|"


def errors(text: str) -> list[str]:
    """What ncu reports as errors in its log."""
    return re.findall(r"^==ERROR== (.*)$", text, re.M)


def read(text: str) -> list[dict[str, Any]]:
    """One record a kernel of ncu's raw CSV, in the order of launches; None for what it lacks.

    Raises:
        ValueError: when durations are not in ns, or a kernel ran outside of a labelled range.
    """
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return []
    units = dict(zip(*rows[:2], strict=True))
    unit = units[METRICS["micros"].names[0]]
    if unit not in ("ns", "nsecond"):
        raise ValueError(f"durations must be in ns (--print-units base), got {unit}")
    return [kernel(dict(zip(rows[0], row, strict=True))) for row in rows[2:]]


def kernel(row: dict[str, str]) -> dict[str, Any]:
    """The record of one row of the CSV."""
    name = row["Kernel Name"]
    found = next((m for cell in row.values() if (m := LABEL.search(cell))), None)
    if found is None:
        raise ValueError(f"every kernel must lie in a labelled range, {name} does not")
    op, direction, *sizes = found.groups()
    place = dict(zip(("tokens", "width", "streams"), map(int, sizes), strict=True))
    return (
        {"op": op, "direction": direction, **place, "kernel": name}
        | {key: figure(row, metric) for key, metric in METRICS.items()}
        | {"stalls": stalls(row)}
    )


def figure(row: dict[str, str], metric: Metric) -> float | None:
    """A metric's value; None where the chip or the version of ncu lacks it."""
    values = [value(row.get(name, "")) for name in metric.names]
    known = [v for v in values if v is not None]
    return sum(known) * metric.factor if len(known) == len(values) else None


def value(cell: str) -> float | None:
    """A number as ncu prints it, 1,234.5; None for "n/a", "no data", nan and an empty cell."""
    try:
        number = float(cell.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def stalls(row: dict[str, str]) -> dict[str, float]:
    """Why warps waited: for each reason how many did at an issued instruction, largest first."""
    found = {
        match[1]: amount
        for name, cell in row.items()
        if (match := STALL.fullmatch(name)) and (amount := value(cell))
    }
    found.pop("selected", None)  # the warp that issues
    largest = sorted(found, key=lambda reason: -found[reason])[:STALLS_KEPT]
    return {reason: found[reason] for reason in largest}
