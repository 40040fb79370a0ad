"""The house itself: imports go down only, the catalog has no untested hole, kernels are named."""

import ast
import re
from pathlib import Path

from custom_ops.catalog import ROWS
from tests import test_ops, test_ops_gpu, test_ops_interpreted

ROOT = Path(__file__).parent.parent
FLOORS = ("custom_ops", "hc_compile", "profiles", "scripts")
EVERY_CASE = {(row.name, variant) for row in ROWS for variant in row.variants}
TIERS = {
    "float64, opcheck, strides, leading dimensions": test_ops.CASES,
    "interpreted kernels": test_ops_interpreted.CASES,
    "kernels on a device": test_ops_gpu.CASES,
}


def imported_floors(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)


def test_imports_go_down_only():
    for level, floor in enumerate(FLOORS):
        files = list((ROOT / floor).rglob("*.py"))
        assert files
        for file in files:
            above = set(imported_floors(file)) & set(FLOORS[level + 1 :])
            assert not above, f"{file.relative_to(ROOT)} imports {above} from a floor above"


def test_reference_shares_nothing_with_the_ops():
    source = (ROOT / "custom_ops" / "reference.py").read_text()
    assert set(re.findall(r"^from (custom_ops\S*)", source, re.M)) == {"custom_ops.constraint"}


def test_manifest_has_no_holes():
    for tier, cases in TIERS.items():
        assert set(cases) == EVERY_CASE, tier
    gradgrad = {name for name, _ in test_ops.GRADGRAD}
    assert gradgrad == {row.name for row in ROWS}


def test_kernels_share_their_prefix():
    """Profiles classify by it."""
    for file in (ROOT / "custom_ops" / "kernels").glob("*.py"):
        for name in re.findall(r"@triton\.jit[^\n]*\ndef (\w+)", file.read_text()):
            assert name.startswith("hc_"), f"{file.name}: {name}"


def test_nothing_disables_the_compiler_or_hides_errors():
    for floor in FLOORS:
        for file in (ROOT / floor).rglob("*.py"):
            source = file.read_text()
            assert "torch.compiler.disable" not in source, file
            assert not re.search(r"except( Exception)?:", source), file
