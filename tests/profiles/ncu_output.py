"""What ncu 2025.3.1 wrote for project forward at 8192×2560 on an H100, its columns trimmed."""

import csv
import io

from profiles import counters
from profiles.sublayer import Shape

NVTX = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
MESSAGES = (
    "==WARNING== Note: Running with unmodified GPU clocks.",
    "==PROF== Connected to process 511 (/usr/bin/python3.12)",
    "",
    "==PROF== Disconnected from process 511",
)
KERNELS = ("hc_project_split", "hc_project", "hc_project_sum")
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_{}.sum"

# column: unit, and its cell for each of the kernels
COLUMNS = {
    "gpu__time_duration.sum": ("ns", "3,552", "65,888", "4,096"),
    "launch__registers_per_thread": ("register/thread", "32", "106", "20"),
    "launch__block_size": ("", "128", "128", "128"),
    "launch__grid_size": ("", "240", "512", "1,600"),
    "launch__waves_per_multiprocessor": ("", "0.11", "1.94", "0.76"),
    "launch__shared_mem_per_block": ("byte/block", "1,024", "82,944", "1,024"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "10.42", "12.06", "56.17"),
    "dram__bytes_read.sum": ("byte", "988,416", "169,764,608", "3,280,384"),
    "dram__bytes_write.sum": ("byte", "0", "4,172,032", "0"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "8.37", "78.77", "24.12"),
    "l1tex__m_xbar2l1tex_read_sectors_mem_lg_op_ld.sum": ("sector", "30,720", "9,175,040", "1"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "24.11", "76.68", "38.78"),
    "lts__t_sector_hit_rate.pct": ("%", "65.04", "24.67", "45.67"),
    "l1tex__throughput.avg.pct_of_peak_sustained_active": ("%", "11.26", "44.23", "16.60"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "9.64", "33.25", "22.67"),
    "smsp__inst_executed.sum": ("inst", "94,080", "18,756,608", "454,400"),
    CONFLICTS.format("ld"): ("", "0", "769", "0"),
    CONFLICTS.format("st"): ("", "0", "437", "0"),
    CONFLICTS.format("ldgsts"): ("", "0", "102,540", "0"),
    "smsp__sass_inst_executed_op_local_ld.sum": ("inst", "0", "0", "0"),
    "smsp__sass_inst_executed_op_local_st.sum": ("inst", "0", "0", "0"),
    STALLED.format("barrier"): ("inst", "0", "1.38", "0"),
    STALLED.format("gmma"): ("inst", "0", "0.04", "0"),
    STALLED.format("long_scoreboard"): ("inst", "9.59", "1.52", "24.53"),
    STALLED.format("membar"): ("inst", "0", "0", "0"),
    STALLED.format("not_selected"): ("inst", "0.13", "0.21", "3.11"),
    STALLED.format("selected"): ("inst", "1", "1", "1.00"),
    STALLED.format("short_scoreboard"): ("inst", "0.83", "0.40", "0.29"),
    STALLED.format("wait"): ("inst", "1.67", "1.04", "0.97"),
}


def ncu_csv(op="project", without=(), **changed):
    """ncu's log; `without` leaves columns out, `changed` overwrites cells of the second kernel.

    A changed column is named by its key in `counters.METRICS`.
    """
    columns = {name: list(cells) for name, cells in COLUMNS.items() if name not in without}
    for key, cell in changed.items():
        columns[counters.METRICS[key].names[0]][2] = cell
    name = counters.label(op, "forward", Shape(8192, 2560))
    found = f'511  "<default domain>:{name}:none:none"'
    rows = [["ID", NVTX, "Kernel Name", *columns], [""] * 3 + [c[0] for c in columns.values()]]
    for k, kernel in enumerate(KERNELS, 1):
        rows.append([str(k - 1), found, kernel, *(cells[k] for cells in columns.values())])
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return "\n".join([*MESSAGES[:2], out.getvalue(), *MESSAGES[2:]])
