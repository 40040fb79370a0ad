"""The record's summary as one picture: time by category, and memory over a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from profiles.report.facts import CATEGORIES, category_order, headline
from profiles.report.parts import MIB

LINES = (("#3b6ea8", "-"), ("#c2603a", "--"), ("#2f855a", ":"), ("#8a4fa3", "-."), ("#777", "-"))


def plot(record: dict[str, Any], file: Path) -> Path | None:
    """Write the picture; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = record["paths"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    starts = dict.fromkeys(paths, 0.0)
    for name in category_order(paths):
        _, label, color = CATEGORIES[name]
        widths = [
            next((c["ms"] for c in path["categories"] if c["name"] == name), 0.0)
            for path in paths.values()
        ]
        hatch = "///" if name == "idle" else None
        left.barh(
            list(paths),
            widths,
            left=list(starts.values()),
            label=label,
            color=color,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.4,
        )
        starts = {path: starts[path] + w for path, w in zip(paths, widths, strict=True)}
    left.invert_yaxis()
    left.set(xlabel="ms a step", title="Where the time of a step goes")
    left.legend(frameon=False, fontsize=8, ncols=2)
    for (name, path), (color, style) in zip(paths.items(), LINES, strict=False):
        curve = path["memory_curve"]
        values = [value / MIB for _, value in curve]
        right.plot([at for at, _ in curve], values, style, label=name, color=color)
    right.set(xlabel="% of the step", ylabel="MiB above its start", title="Memory over a step")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(headline(record)[0], fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
