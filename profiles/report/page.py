"""One self-contained HTML page: styles, charts and script inside, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from profiles.report.facts import CATEGORIES, headline
from profiles.report.sections import SECTIONS


def asset(name: str) -> str:
    """A file that lies beside this one."""
    return (resources.files("profiles.report") / name).read_text(encoding="utf-8")


def page(record: Mapping[str, Any]) -> str:
    """The whole page of a record.

    Args:
        record: from `profiles.paths.profile_workload`.
    Returns: HTML that opens from disk.
    """
    what, result = headline(record)
    title = f"Profile of {record['workload']['model']}"
    colors = "".join(f".{kind}{{fill:{color}}}" for kind, _, color in CATEGORIES.values())
    body = "".join(section(record) for section in SECTIONS)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{colors}{asset('style.css')}</style>"
        "<noscript><style>.pair[hidden]{display:block}.menu{display:none}</style></noscript>"
        f"</head><body>{asset('hatch.svg')}<header><h1>{escape(title)}</h1>"
        f'<p class="lede">{escape(what)} <strong>{escape(result)}</strong></p></header>'
        f"<main>{body}</main><script>{asset('page.js')}</script></body></html>\n"
    )
