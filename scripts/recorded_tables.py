"""Write the tables of the READMEs from the recorded runs that their markers name.

    python -m scripts.recorded_tables          # rewrites what differs, and says where

    <!-- table: FILE TABLE [KEY=VALUE ...] -->
    ...
    <!-- end -->

FILE lies in profiles/results, TABLE is one of its tables below; KEY=VALUE keeps the records with
that value or one of several (`'way=eager PyTorch|ours, eager'`, in quotes where it has blanks).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import partial

from profiles import tables
from profiles.machine import ROOT
from scripts import (
    bench_compat,
    bench_compile_time,
    bench_inference,
    bench_integrations,
    bench_layers,
    profile_kernels,
)

READMES = ("README.md", "profiles/README.md", "hc_compile/compat/README.md")
MARKED = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.S)

# renderings of one list of a record, by its name
LISTS: dict[str, Callable[[list[dict]], str]] = {
    "sublayer": tables.sublayer_table,
    "seam": tables.seam_table,
    "ops": tables.ops_table,
    "small": tables.small_table,
    "model": tables.model_table,
    "saved": tables.saved_table,
    "layers": bench_layers.layers_table,
    "memory": bench_layers.memory_table,
}
# renderings of a whole record, and the list that KEY=VALUE filters
WHOLE: dict[str, tuple[str, Callable[[dict], str]]] = {
    "triton": ("records", partial(bench_compat.table, name="triton")),
    "package": ("records", partial(bench_compat.table, name="package")),
    "inference": ("inference", bench_inference.table),
    "integrations": ("integrations", bench_integrations.table),
    "compile": ("compile", bench_compile_time.table),
    "kernels": ("kernels", profile_kernels.table),
}


def table(marker: str) -> str:
    """The table that a marker's text names."""
    file, name, *conditions = shlex.split(marker)
    data = json.loads((ROOT / "profiles" / "results" / file).read_text())
    where = name if name in LISTS else WHOLE[name][0]
    for key, _, values in (condition.partition("=") for condition in conditions):
        data[where] = [r for r in data[where] if str(r[key]) in values.split("|")]
    return LISTS[name](data[name]) if name in LISTS else WHOLE[name][1](data)


def written(text: str) -> str:
    """A README's text with every marked table as its record has it."""
    return MARKED.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text)


def main() -> None:
    """Command line."""
    for name in READMES:
        text = (ROOT / name).read_text()
        if written(text) != text:
            (ROOT / name).write_text(written(text))
            print(f"{name}: tables written")


if __name__ == "__main__":
    main()
