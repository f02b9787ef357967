"""The page as a reader meets it: Chromium, light and dark, narrow, by keyboard, on paper."""

from __future__ import annotations

import os
import shutil

import pytest

from louver.report import write_report
from louver.types import Check, Verdict

pytestmark = pytest.mark.browser

PATIENCE_MS = 120_000  # a machine that does other work too is slow, not wrong

HOSTILE = "<script>window.broken=1</script><img src=x onerror=window.broken=1>"

CONTRAST = """() => {
  const channels = (css) => css.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((c) => (c /= 255, c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4));
    return .2126 * R + .7152 * G + .0722 * B;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = channels(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    throw new Error("nothing behind");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const ink = channels(node.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), node.className.baseVal ?? node.className, walker.currentNode.data.trim()]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    def missing(why):
        # A pipeline that lost its browser must not look as if the page had been tested.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)

    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("Chromium is not installed")
    with sync_playwright() as playwright:
        flags = ["--disable-background-networking", "--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        held = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield held
        held.close()


@pytest.fixture
def open_page(browser, tmp_path):
    pages = []

    def opened(audit, panels=(), *, width=1280, scheme="light"):
        path = write_report(audit, panels, tmp_path / f"report-{len(pages)}.html")
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE_MS)
        pages.append(page)
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for page in pages:
        page.close()


def test_it_renders_alone_and_in_silence(open_page, make_audit, make_panels):
    audit = make_audit()
    page = open_page(audit, make_panels(audit))
    sizes = page.evaluate("[...document.images].map((i) => [i.complete, i.naturalWidth, i.naturalHeight])")
    assert sizes == [[True, 32, 32]] * (4 * 2 * 4 * 6)
    shown = page.locator("img").first
    assert shown.bounding_box()["width"] >= 96
    assert shown.evaluate("(i) => getComputedStyle(i).imageRendering") == "pixelated"
    assert page.complaints == []
    assert [url[:40] for url in page.asked if not url.startswith("data:")] == [page.url[:40]]


def test_a_hostile_name_does_not_run(open_page, make_audit, make_panels):
    audit = make_audit(name=HOSTILE, cuts=[HOSTILE, "b"], attacks=[HOSTILE], config={"x": HOSTILE})
    page = open_page(audit, make_panels(audit))
    assert page.evaluate("window.broken === undefined")
    assert page.locator("h1").inner_text() == HOSTILE
    assert len([url for url in page.asked if not url.startswith("data:")]) == 1
    assert page.complaints == []


def test_a_script_that_got_in_is_stopped_by_the_page_itself(browser, make_audit, tmp_path):
    path = write_report(make_audit(), [], tmp_path / "report.html")
    path.write_text(path.read_text().replace("</main>", "<script>window.broken=1</script></main>"))
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(path.as_uri())
    assert page.evaluate("window.broken === undefined")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(open_page, make_audit, make_panels, scheme):
    verdicts = [
        Verdict(passed=True, headline="h", checks=(Check(rule="r", status="holds", reason="x"),)),
        None,  # broken, with one check of each status and a warning
        Verdict(passed=False, headline="h", checks=(Check(rule="r", status="not shown", reason="x"),)),
        Verdict(passed=True, headline="h", checks=()),
    ]
    papers = set()
    for verdict in verdicts:
        # One page holds every kind of text and every line color; the others only add their verdict.
        whole = {"cuts": ["conv1", "layer2.1"], "attacks": [f"attack {i}" for i in range(6)], "n_measures": 2}
        brief = {"cuts": ["conv1"], "attacks": ["Decoder"], "n_measures": 1}
        audit = make_audit(verdict=verdict, **(brief if verdict else whole))
        page = open_page(audit, [] if verdict else make_panels(audit, k=1), scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        found = page.evaluate(CONTRAST)
        assert len(found) > (80 if verdict else 250)
        assert [entry for entry in found if entry[0] < 4.5] == []
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    (paper,) = papers
    assert (sum(int(c) for c in paper[4:-1].split(",")) > 600) == (scheme == "light")


@pytest.mark.parametrize("kind", ["usual", "many", "long"])
def test_nothing_is_wider_than_the_window(open_page, make_audit, make_panels, kind):
    long = "W" * 180
    audit = {
        "usual": lambda: make_audit(),
        "many": lambda: make_audit(
            cuts=[f"features.block{i}" for i in range(12)], attacks=[f"attack {i}" for i in range(5)], n_measures=3
        ),
        "long": lambda: make_audit(
            cuts=[long + str(i) for i in range(2)],
            attacks=[long],
            name=long,
            config={long: long},
            verdict=Verdict(
                passed=False, headline=long, checks=(Check(rule=long, status="broken", reason=long),), warnings=(long,)
            ),
        ),
    }[kind]()
    page = open_page(audit, make_panels(audit)[:2])
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    for width in (320, 360, 768):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_reaches_every_table(open_page, make_audit, make_panels):
    audit = make_audit(cuts=["a", "b"], attacks=["Decoder"], n_measures=3)
    page = open_page(audit, make_panels(audit))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "verdict"
    reached, outlines = set(), set()
    for _ in range(120):
        page.keyboard.press("Tab")
        label, outline = page.evaluate(
            "[document.activeElement.ariaLabel, parseFloat(getComputedStyle(document.activeElement).outlineWidth)]"
        )
        if page.evaluate("document.activeElement === document.body"):
            break
        reached.add(label)
        outlines.add(outline)
    regions = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter((r) => r.checkVisibility()).map((r) => r.ariaLabel)"
    )
    assert len(regions) > 7
    assert set(regions) <= reached
    assert outlines == {3}


def test_folds_open_by_keyboard(open_page, make_audit):
    page = open_page(make_audit())
    fold = page.locator("#findings summary").first
    fold.focus()
    page.keyboard.press("Enter")
    assert page.locator("#findings details").first.get_attribute("open") is not None


def test_headers_stay_in_view_while_a_table_scrolls(open_page, make_audit):
    page = open_page(make_audit(cuts=[f"cut{i}" for i in range(30)]), width=360)
    region = page.locator("#glance .scroll")
    region.evaluate("(r) => r.scrollTo(150, 400)")
    box, corner = region.bounding_box(), region.locator("thead th").first.bounding_box()
    assert corner["x"] == pytest.approx(box["x"], abs=1)
    # The corner sticks for two reasons; its neighbor only for being in the head.
    for header in (corner, region.locator("thead th").nth(2).bounding_box()):
        assert header["y"] == pytest.approx(box["y"], abs=2)
    assert region.locator("tbody th").nth(12).bounding_box()["x"] == pytest.approx(box["x"], abs=1)


@pytest.mark.parametrize("kind", ["usual", "many"])
def test_paper_shows_all_and_clips_nothing(open_page, make_audit, make_panels, kind):
    audit = (
        make_audit()
        if kind == "usual"
        else make_audit(
            cuts=[f"features.denseblock{i}.denselayer{i}.relu" for i in range(9)],
            attacks=["Decoder", "Likelihood", "Shadow", "Deep image prior", "MeanImage"],
            n_measures=6,
        )
    )
    page = open_page(audit, make_panels(audit, k=8)[:4], width=688, scheme="dark")  # A4 less its margins
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    hidden = "[...document.querySelectorAll('td, th, img')].filter((n) => !n.checkVisibility()).length"
    assert page.evaluate(hidden) == 0
    clipped = (
        "[...document.querySelectorAll('table')].filter((t) => t.scrollWidth > t.parentElement.clientWidth + 1).length"
    )
    assert page.evaluate(clipped) == 0
    paper = page.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF-")
    assert len(paper) > 50_000
