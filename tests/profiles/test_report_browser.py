"""The page in a real browser; left out where playwright or Chromium is not installed."""

import shutil

import pytest

from profiles.report import write
from tests.profiles.report_records import record

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking".split()
WIDTHS, SCHEMES = (1280, 375), ("light", "dark")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture(params=[(w, s) for w in WIDTHS for s in SCHEMES], ids=str)
def shown(request, browser, tmp_path):
    """The page from disk, with what it asked for and what it complained about."""
    width, scheme = request.param
    file = write(record(), tmp_path)[0]
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked, complaints = [], []
    tab.on("request", lambda r: asked.append(r.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(file.as_uri())
    yield tab, width, scheme
    assert asked == [file.as_uri()] and not complaints
    tab.close()


def test_nothing_sticks_out_sideways(shown):
    tab, width, _ = shown
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    wide = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg')"
    assert tab.evaluate(f"[...document.querySelectorAll('body *')].filter({wide}).length") == 0


def test_text_is_readable_in_both_schemes(shown):
    tab, _, scheme = shown
    colours = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    text, back = (
        [int(part) for part in colour[4:-1].split(",")]
        for colour in tab.eval_on_selector("body", colours)
    )
    assert (sum(text) > sum(back)) == (scheme == "dark")
    assert abs(sum(text) - sum(back)) > 500
    sizes = "[...document.querySelectorAll('main :is(text, td, th, p, li)')].map("
    sizes += "e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(tab.evaluate(sizes)) >= 12


def test_the_menu_shows_one_pair_and_the_switch_one_chart(shown):
    tab, _, _ = shown
    seen = (
        "[...document.querySelectorAll('.pair')].filter(e => e.checkVisibility()).map(e => e.id)"
    )
    assert len(tab.evaluate(seen)) == 1
    tab.select_option("#pairs", "pair-3")
    assert tab.evaluate(seen) == ["pair-3"]
    assert tab.is_visible(".as-ms") and not tab.is_visible(".as-share")
    tab.check("#in-share")
    assert tab.is_visible(".as-share") and not tab.is_visible(".as-ms")


def test_labels_stay_inside_their_bars(shown):
    tab, _, _ = shown
    outside = """[...document.querySelectorAll('svg.bars .in')].filter(e => e.checkVisibility()
        && e.getBoundingClientRect().width).filter(e => {
        const bar = e.previousElementSibling.getBoundingClientRect();
        const text = e.getBoundingClientRect();
        return text.right > bar.right + 1 || text.left < bar.left;
    }).map(e => e.textContent)"""
    assert tab.evaluate(outside) == []
    tab.check("#in-share")
    assert tab.evaluate(outside) == []
