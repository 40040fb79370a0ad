"""The page's structure: parses, is self-contained, says every number and nothing invalid."""

import copy
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from profiles.path_run import typical_ms
from profiles.regression import compare
from profiles.report import write
from profiles.report.charts import ticks
from profiles.report.facts import headline
from profiles.report.page import page
from profiles.report.parts import mib, number
from tests.profiles.report_records import record

RESULTS = Path(__file__).parents[2] / "profiles" / "results"
VOID = {"meta", "input", "wbr", "br", "link", "img"}
NUMBER = re.compile(
    r"^(~?-?[\d,]+(\.\d+)?(e-?\d+)?( %)?|–|[\d.,]+ \(\d+\)|\d+( × \d+)*|\d+e-\d+)$"
)


class Page(HTMLParser):
    """A strict reader: every tag closes in order; keeps elements, cells and text."""

    def __init__(self, source):
        super().__init__()
        self.stack, self.tags, self.numbers, self.text = [], [], [], []
        self.tables, self.captions = 0, []
        self.feed(source)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.stack.append((tag, attributes))
            if tag == "td" and attributes.get("class") == "n":
                self.numbers.append("")
            if tag == "caption":
                self.captions.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1][0] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data):
        inside = [tag for tag, _ in self.stack]
        if inside and inside[-1] in ("style", "script"):
            return
        self.text.append(data)
        if self.stack and self.stack[-1][1].get("class") == "n" and inside[-1] == "td":
            self.numbers[-1] += data
        if "caption" in inside:
            self.captions[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


RECORDS = {"without a GPU": record(), "with a GPU": record(gpu=True)}
RECORDS |= {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("paths_*.json")}


@pytest.fixture(params=RECORDS, scope="module")
def made(request):
    found = RECORDS[request.param]
    source = page(found)
    return found, source, Page(source)


def test_nothing_is_fetched(made):
    _, source, found = made
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", source)
    for _, attributes in found.tags:
        assert not {"src", "href", "srcset", "data"} & set(attributes)
    assert not found.all("link") and not found.all("img")


def test_every_path_and_section_is_there(made):
    data, _, found = made
    text = " ".join(found.text)
    for name, path in data["paths"].items():
        assert f"{name}: {path['what']}" in text
        assert path["trace"]["kernels"][0]["name"][:20] in "".join(found.text)
    ids = [a["id"] for a in found.all("section")]
    assert ids == "paths time memory changes floors kernels compile environment".split()
    assert data["machine"]["hardware"] in text and all(note in text for note in data["notes"])


def test_numbers_are_valid(made):
    _, source, found = made
    assert len(found.numbers) > 60
    wrong = [value for value in found.numbers if not NUMBER.match(value)]
    # a column of kernels' names is text
    assert all(value.startswith("hc_") for value in wrong), wrong
    assert not re.search(r"\b(nan|inf|None|NaN|Infinity)\b", " ".join(found.text))
    assert not re.search(r"(width|x|y|points)=\"[^\"]*(nan|inf|-\d)", source)


def test_what_a_reader_of_screens_needs(made):
    _, source, found = made
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a.get("aria-labelledby", "") for _, a in found.tags]
    assert {name for value in named for name in value.split()} <= set(ids)
    for chart in [a for a in found.all("svg") if a.get("role") == "img"]:
        assert len(chart["aria-labelledby"].split()) == 2
    assert len(found.captions) == len(found.all("table")) and all(found.captions)
    assert all(a.get("scope") for a in found.all("th"))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert found.all("html")[0]["lang"] == "en" and "prefers-color-scheme: dark" in source


def test_every_pair_of_paths_has_its_difference(made):
    data, _, found = made
    count = len(data["paths"])
    pairs = [a for a in found.all("div") if a.get("class") == "pair"]
    assert len(pairs) == count * (count - 1) / 2 == len(found.all("option"))
    assert sum("hidden" not in a for a in pairs) == 1
    assert any(c.startswith("Vanished: in eager only") for c in found.captions)
    assert "In both, called more or less often: " in " ".join(found.text)


def test_text_of_others_is_escaped():
    source = page(record())
    assert "<script>print" not in source and "&lt;script&gt;print" in source
    assert "Some &lt;CPU&gt;" in source


def test_what_is_estimated_is_said():
    text = " ".join(Page(page(record())).text)
    assert "Peak (estimated)" in text and "plain torch" in text and "rows marked ~" in text
    text = " ".join(Page(page(record(gpu=True))).text)
    assert "shared out by their time alone (estimated)" in text and "max_memory" in text


def test_a_gpus_ops_show_their_time_in_the_trace():
    captions = dict.fromkeys(Page(page(record(gpu=True))).captions)
    assert "fused: hc:: ops of a step, per call" in captions
    assert "3 × floor" in page(record(gpu=True)) and "ms in trace" in page(record(gpu=True))
    assert "ms in trace" not in page(record())


def test_the_opening_lines_say_what_on_what_and_the_result():
    what, result = headline(record())
    assert "Net, 1,234 parameters, int64 [8, 128]: one training step in 4 paths on 4 CPU" in what
    assert result.startswith("fused takes 0.412 ms a step where eager takes 1.52 ms (3.70× as")
    assert "with 4 instead of 25.5 operator calls and 100% of its peak memory." in result


def test_a_step_is_the_median_on_a_gpu_and_the_fastest_on_a_cpu():
    times = [5.0, 3.0, 9.0]
    assert typical_ms(times, "cuda") == 5.0 and typical_ms(times, "cpu") == 3.0
    heads = [" ".join(Page(page(record(gpu))).text) for gpu in (False, True)]
    assert "median ms" in heads[0] and "fastest ms" in heads[1]


def test_unsteady_steps_are_said():
    busy = copy.deepcopy(record())
    busy["paths"]["eager"]["steps_ms"] = [10.0, 10.2, 10.1, 10.4, 10.3]
    busy["paths"]["fused"]["steps_ms"] = [4.0, 4.1, 6.0, 6.1, 9.0]
    text = " ".join(Page(page(busy)).text)
    assert "fused: half of its steps lie outside 4.05 to 7.55 ms" in text
    assert "eager: half" not in text


def test_one_path_alone_and_a_model_without_ops():
    alone = record()
    alone["paths"] = {"eager": alone["paths"]["eager"]}
    found = Page(page(alone))
    ids = [a["id"] for a in found.all("section")]
    assert ids == ["paths", "time", "memory", "kernels", "environment"]


def test_a_comparison_is_shown():
    new = copy.deepcopy(record())
    new["paths"]["fused"]["step_ms"] *= 2
    new["comparison"] = compare(record(), new, "old.json")
    text = " ".join(Page(page(new)).text)
    assert "Against old.json" in text and "+100 %" in text and "regressed" in text


def test_files(tmp_path):
    files = write(record(), tmp_path / "new", "mine")
    assert [file.name for file in files] == ["mine.html", "mine.json", "mine.png"]
    assert json.loads(files[1].read_text()) == record()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="JSON compliant"):
        write(record() | {"copy_gb_per_s": float("nan")}, tmp_path)


def test_recorded_pages_are_what_their_json_gives():
    recorded = list(RESULTS.glob("paths_*.json"))
    assert recorded
    for file in recorded:
        assert page(json.loads(file.read_text())) == file.with_suffix(".html").read_text(), file


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (38.0, "38"),
        (1234.5, "1,234"),
        (99.97, "100"),
        (72.04, "72.0"),
        (9.996, "10.0"),
        (0.9996, "1.00"),
        (1.234, "1.23"),
        (0.0604, "0.060"),
        (0.00234, "0.0023"),
        (1e-6, "1e-06"),
    ],
)
def test_numbers_as_text(value, text):
    assert number(value) == text
    assert mib(3 * 2**20) == "3" and mib(None) == "–"


@pytest.mark.parametrize("top", [0.3, 1.0, 7.1, 71.4, 99.0, 4000.0])
def test_ticks_are_round_and_reach_the_top(top):
    marks = ticks(top)
    assert marks[0] == 0 and marks[-1] >= top and 2 <= len(marks) <= 6
    assert ticks(0) == [0.0, 1.0]


@pytest.mark.parametrize("gpu", [False, True])
def test_idle_is_the_rest_of_the_step_that_the_kernels_were_timed_in(gpu):
    for path in record(gpu)["paths"].values():
        idle = next(c["ms"] for c in path["categories"] if c["name"] == "idle")
        whole = path["step_ms"] if gpu else path["trace"]["step_micros"] / 1e3
        assert idle == pytest.approx(whole - path["busy_ms"]) and idle > 0
