"""ncu's CSV is read to the digit, and what is missing stays missing."""

from itertools import pairwise
from pathlib import Path

import pytest

from profiles import counters
from tests.profiles.ncu_output import KERNELS, STALLED, ncu_csv


def test_every_kernel_is_read_with_its_op():
    records = counters.read(ncu_csv("post_pre, delayed"))
    assert [r["kernel"] for r in records] == list(KERNELS)
    place = {"direction": "forward", "tokens": 8192, "width": 2560, "streams": 4}
    assert all(r.items() >= ({"op": "post_pre, delayed"} | place).items() for r in records)


def test_numbers_lose_their_separators_and_take_our_units():
    product = counters.read(ncu_csv())[1]
    assert product["micros"] == pytest.approx(65.888)
    assert product["dram_read_bytes"] == 169_764_608
    assert product["l2_read_bytes"] == 9_175_040 * 32
    assert (product["dram_percent"], product["registers"]) == (78.77, 106)


def test_metrics_of_several_columns_are_their_sum():
    changed = ncu_csv(spills="1,000")
    product = counters.read(changed)[1]
    assert product["shared_conflicts"] == 769 + 437 + 102_540
    assert product["spills"] == 1000


@pytest.mark.parametrize("cell", ["", "n/a", "no data", "nan"])
def test_an_unknown_cell_is_none(cell):
    split, product, _ = counters.read(ncu_csv(dram_percent=cell))
    assert product["dram_percent"] is None and split["dram_percent"] == 8.37


@pytest.mark.parametrize("key", ["shared_conflicts", "l2_hit_percent"])
def test_a_metric_that_lacks_a_column_is_none(key):
    lacking = counters.METRICS[key].names[-1]
    for record in counters.read(ncu_csv(without=(lacking,))):
        assert record[key] is None
        others = counters.METRICS.keys() - {key}
        assert all(record[other] is not None for other in others)


def test_stalls_are_the_largest_five_in_order():
    split, product, last = (record["stalls"] for record in counters.read(ncu_csv()))
    assert list(product.items()) == [
        ("long_scoreboard", 1.52),
        ("barrier", 1.38),
        ("wait", 1.04),
        ("short_scoreboard", 0.40),
        ("not_selected", 0.21),
    ]
    assert list(split) == ["long_scoreboard", "wait", "short_scoreboard", "not_selected"]
    assert next(iter(last)) == "long_scoreboard" and last["long_scoreboard"] == 24.53
    without = counters.read(ncu_csv(without=(STALLED.format("barrier"),)))[1]["stalls"]
    assert list(without)[-1] == "gmma"


def test_other_units_and_kernels_outside_of_ranges_are_refused():
    with pytest.raises(ValueError, match=r"must be in ns .* got us"):
        counters.read(ncu_csv().replace('"ns"', '"us"'))
    with pytest.raises(ValueError, match="labelled range, hc_project_split does not"):
        counters.read(ncu_csv().replace("HC|", ""))


def test_a_log_without_kernels_holds_ncus_errors():
    log = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n"
    assert counters.read(log) == []
    assert counters.errors(log) == ["ERR_NVGPUCTRPERM - no permission"]


def test_the_newest_ncu_is_found_and_path_comes_first(tmp_path, monkeypatch):
    for version in ("2025.3.1", "2025.10.0", "2024.1.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch()
    monkeypatch.setattr(counters, "PLACES", (str(tmp_path / "none"), str(tmp_path / "*/ncu")))
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert counters.find_ncu() == str(tmp_path / "2025.10.0" / "ncu")
    monkeypatch.setattr(counters.shutil, "which", lambda name: f"/somewhere/{name}")
    assert counters.find_ncu() == "/somewhere/ncu"


def test_no_ncu_is_an_error_that_says_where_it_was_sought(tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "PLACES", (str(tmp_path / "*/ncu"),))
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=rf"on PATH or at {tmp_path}/\*/ncu, found none"):
        counters.find_ncu()


def test_the_command_ends_with_the_child_and_names_every_section():
    command = counters.ncu_command("ncu", Path("log.csv"), ["python", "-m", "x", "--child"])
    assert command[0] == "ncu" and command[-4:] == ["python", "-m", "x", "--child"]
    pairs = list(pairwise(command))
    sections = [name for option, name in pairs if option == "--section"]
    assert sections == list(counters.SECTIONS)
    for pair in (
        ("--clock-control", "none"),
        ("--kernel-name", "regex:hc_"),
        ("--target-processes", "application-only"),
        ("--profile-from-start", "off"),
        ("--print-units", "base"),
        ("--page", "raw"),
        ("--log-file", "log.csv"),
    ):
        assert pair in pairs
    assert {"--nvtx", "--csv"} <= set(command)
