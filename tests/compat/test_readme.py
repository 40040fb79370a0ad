"""hc_compile/compat/README.md: every name imports, every option is accepted or refused as said."""

import ast
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import hc_compile
from hc_compile.compat import hyper_connections, mhc_triton

ROOT = Path(hc_compile.__file__).parent.parent
TEXT = (ROOT / "hc_compile/compat/README.md").read_text()
OWN = {"hyper-connections (PyPI) and its mHC fork": "hc_compile.compat.hyper_connections",
       "mHC-Triton": "hc_compile.compat.mhc_triton"}  # fmt: skip


def section(title, part):
    """One `###` part of one `##` section."""
    body = re.split(r"^## ", TEXT, flags=re.M)
    (found,) = (b for b in body if b.startswith(title))
    (inner,) = (b for b in re.split(r"^### ", found, flags=re.M) if b.startswith(part))
    return inner


def rows(title, part):
    """The cells of its table, without header and rule."""
    lines = [line for line in section(title, part).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def resolve(path):
    """The object of a dotted name."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


NAMES = [(title, *row) for title in OWN for row in rows(title, "Names")]
OPTIONS = [(title, *row) for title in OWN for row in rows(title, "Options")]


@pytest.mark.parametrize(("title", "theirs", "mine"), NAMES)
def test_names(title, theirs, mine):
    if mine.startswith("none"):
        return
    name = re.match(r"`([\w.]+)`", mine).group(1)
    assert resolve(name) is not None
    last = theirs.strip("`").removesuffix("()").split(".")[-1]
    assert name.endswith(last) or "triton_sinkhorn" in theirs


def test_every_public_name_is_listed():
    listed = {re.match(r"`([\w.]+)`", mine).group(1) for _, _, mine in NAMES if mine[0] == "`"}
    for module in (hyper_connections, mhc_triton):
        for name in module.__all__:
            assert f"{module.__name__}.{name}" in listed, name


def value_of(text):
    text = text.strip("`")
    return eval(text, {"torch": torch, "nn": nn})


def build(title, option, value):
    """The object that an option row describes, and the class that takes it."""
    called, last = re.match(r"`([\w.]+)\((.*?)(?:, )?(?=\w+=\))(?:\w+)=\)`", option).groups()
    name = re.search(r"(\w+)=\)`$", option).group(1)
    fixed = {
        k.arg: ast.literal_eval(k.value) for k in ast.parse(f"f({last})").body[0].value.keywords
    }
    kind = resolve(f"{OWN[title]}.{called}")
    defaults = {"dim": 12} | ({} if title == "mHC-Triton" else {"num_residual_streams": 4})
    return kind(**(defaults | fixed | {name: value_of(value)}))


def text_of(verdict):
    return verdict.removeprefix("refused: ")


@pytest.mark.parametrize(("title", "option", "value", "verdict"), OPTIONS)
def test_options(title, option, value, verdict):
    if verdict.startswith("refused"):
        with pytest.raises((ValueError, TypeError), match=re.escape(text_of(verdict))):
            build(title, option, value)
        return
    assert verdict[0] == "=" or verdict.startswith("ours only")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert isinstance(build(title, option, value), nn.Module)
    assert bool(caught) == ("warns" in verdict)


def test_every_constructor_argument_is_in_a_table():
    """An option can't be added without a row."""
    import inspect

    for title, kinds in {
        "mHC-Triton": [mhc_triton.HyperConnection],
        "hyper-connections (PyPI) and its mHC fork": [
            hyper_connections.HyperConnections,
            hyper_connections.mHC,
            hyper_connections.mHCv2.mHC,
        ],
    }.items():
        listed = set(re.findall(r"(\w+)=\)", section(title, "Options")))
        for kind in kinds:
            named = set(inspect.signature(kind).parameters) - {"dim", "branch", "eps"}
            assert named <= listed, (kind, named - listed)


@pytest.mark.parametrize("title", OWN)
def test_before_and_after(title):
    """The second line of each pair runs and gives what the first would."""
    body = next(b for b in re.split(r"^## ", TEXT, flags=re.M) if b.startswith(title))
    before, after = re.search(r"```python\n(.*?)```", body, re.S).group(1).strip().split("\n")
    names: dict = {}
    exec(after, names)
    wanted = re.search(r"import ([\w, ]+)", before).group(1)
    assert all(name.strip() in names for name in wanted.split(","))


def test_commands_name_what_exists():
    for command in re.findall(r"pytest (tests/\S+?)(?:::(\w+))? -v", TEXT):
        assert f"class {command[1]}" in (ROOT / command[0]).read_text()
    for module, tables in re.findall(r"python -m (scripts\.\w+) --tables (\w+)", TEXT):
        assert tables in importlib.import_module(module).TABLES
