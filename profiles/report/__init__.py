"""The report of `profiles.paths`: one HTML page, one PNG, one JSON, from one record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from profiles.report.page import page
from profiles.report.plot import plot


def write(record: dict[str, Any], out: Path, name: str = "report") -> list[Path]:
    """Write NAME.json, NAME.html and (with matplotlib) NAME.png into a folder.

    Args:
        record: from `profiles.paths.profile_workload`.
        out: folder, made if missing.
        name: of the files.
    Returns: the files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    data, html = out / f"{name}.json", out / f"{name}.html"
    data.write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    html.write_text(page(record), encoding="utf-8")
    image = plot(record, out / f"{name}.png")
    return [html, data, *([image] if image else [])]
