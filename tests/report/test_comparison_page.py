"""The page of a comparison: what it says, and how a reader meets it in Chromium."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from markupsafe import escape
from test_report_browser import CONTRAST, PATIENCE_MS, browser
from test_report_page import Page

from louver.comparison import compare
from louver.ordering import ordered
from louver.report import words
from louver.report.comparison import render_comparison, write_comparison
from louver.report.comparison_words import headline, titles
from louver.report.figures import Point
from louver.report.scatter import Group, Spot, group_key, scatter_chart
from louver.strips import pictures
from louver.tasks import Attributes, Classification, ReIdentification
from studies import bench, facts, write

__all__ = ["browser"]

HOSTILE = "<script>window.broken=1</script><img src=x onerror=window.broken=1>\"'&"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ordered(compare([bench(tmp_path_factory.mktemp("bench"))]))


@pytest.fixture(scope="module")
def text(found):
    return render_comparison(found, pictures(found))


def small(folder, name="other", **changed):
    both = {"decoder": 0.8, "likelihood": 0.7}
    write(folder / "none", facts("none", "none", 0.9, both))
    made = facts(name, changed.pop("defense", "noise"), 0.88, {"decoder": 0.4, "likelihood": 0.35}, **changed)
    write(folder / "other", made)
    return compare([folder])


# What it says


def test_every_split_is_told_with_intervals_cost_and_chance(found, text):
    told = Page(text).text
    for one in found.entries:
        leak, use = one.leak, one.utility
        for value in (leak.mean, leak.low, leak.high, leak.worst, leak.worst_low, leak.worst_high, leak.floor):
            assert words.value_in_words(leak.measure, leak.unit, value) in told
        for value in (use.mean, use.low, use.high):
            assert words.utility_in_words("accuracy", value).replace(words.NARROW, " ") in told
        assert words.count_in_words(one.facts.edge_macs) in told
        assert words.bytes_in_words(one.facts.feature_bytes) in told
        for probe in one.facts.probes:
            assert f"chance {words.value_in_words('', 'share', probe.chance)}".replace(words.NARROW, " ") in told
        assert titles(found)[one.label] in told
    assert "linear on features" in told
    assert "tail on reconstructions (decoder)" in told


def test_the_first_thing_said_is_what_was_found(found, text):
    page = Page(text)
    assert page.text.index(headline(found)[:60]) < page.text.index("Utility against leakage")
    by_result = {}
    for standing in found.standings:
        by_result.setdefault(standing.result, []).append(standing)
    assert f"{len(by_result['gain'])} of {len(found.standings)} (adversarial; bottleneck;" in headline(found)
    assert "1 of 13 (SiftFunnel)" in headline(found)
    assert "costs the edge 1.17 times the MACs" in page.text


@pytest.mark.parametrize(
    ("task", "title"),
    [
        (Classification("label", 10), "Classification of 'label' into 10 classes"),
        (ReIdentification(camera=None), "Re-identification by 'identity'"),
        (Attributes(columns={"body": 6, "color": 8}), "Attributes 'body' and 'color'"),
        (Attributes(columns={"body": 6}), "Attributes 'body'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_task_is_told_in_words(tmp_path, task, title):
    told = {"task": repr(task), "task_title": task.title, "group": ""}
    for name, defense in (("none", "none"), ("other", "noise")):
        write(tmp_path / name, facts(name, defense, 0.9, {"decoder": 0.8}, **told))
    text = render_comparison(compare([tmp_path]))
    assert type(task).__name__ + "(" not in text
    assert f"<h1>{escape(title)}</h1>" in text
    assert f"<title>{escape(title)}: defenses compared</title>" in text


def test_the_task_of_facts_without_a_title_is_told_in_words_too(tmp_path):
    for task, title in (
        (Classification("label", 10), "classification of 'label'"),
        (ReIdentification(camera=None), "re-identification by 'identity'"),
        (Attributes(columns={"body": 6, "color": 8}), "attributes 'body', 'color'"),
    ):
        folder = tmp_path / type(task).__name__
        for name in ("none", "other"):
            made = facts(name, "none", 0.9, {"decoder": 0.8}, task=repr(task), task_title=None, variant=name)
            write(folder / name, made)
        assert f"task: {title}" in Page(render_comparison(compare([folder]))).text


def test_without_defenses_it_says_so(tmp_path):
    found = small(tmp_path, defense="none", variant="tuned")
    assert "No defense is among these splits" in Page(render_comparison(found)).text


def test_it_asks_for_nothing_from_anywhere(text):
    page = Page(text)
    addresses = [
        value for tag, held in page.tags for name, value in held.items() if name in ("src", "href") and tag != "a"
    ]
    assert addresses
    assert all(value.startswith("data:image/png;base64,") for value in addresses)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "://" not in text
    anchors = {held["href"][1:] for tag, held in page.tags if tag == "a"}
    assert anchors <= {held["id"] for _, held in page.tags if "id" in held}
    ids = [held["id"] for _, held in page.tags if "id" in held]
    assert len(ids) == len(set(ids))


def test_every_picture_says_what_it_is(found, text):
    alts = [held["alt"] for tag, held in Page(text).tags if tag == "img"]
    # True pictures once in the open and once behind the fold, and a strip for every split.
    assert len(alts) == 6 * (len(found.entries) + 2)
    assert any(re.fullmatch(r"Rebuilt from Hybrid, σ 2 by decoder: test image \d+, SSIM 0\.2\d\d", alt) for alt in alts)


def test_the_order_by_difficulty_is_told(found):
    held = replace(found.order, correlation=0.3141, low=-0.2, high=0.7, p_value=0.21, orders=False)
    told = Page(render_comparison(replace(found, order=held))).text
    assert "0.314 (−0.200 to 0.700), p = 0.210. It does not order them better than chance." in told
    told = Page(render_comparison(replace(found, order=None, order_note="s0 lacks mine"))).text
    assert "No order is tested: s0 lacks mine." in told


def test_unfinished_studies_are_named(found):
    assert "runs/x/begun" in Page(render_comparison(replace(found, unfinished=("runs/x/begun",)))).text


def test_titles_tell_all_splits_apart(tmp_path, found):
    assert len(set(titles(found).values())) == len(found.entries)
    assert titles(found)["patrol-without-adversary1"] == "PATROL without adversary, β 1"
    assert titles(found)["none-layer3"] == "undefended (layer3)"
    both = {"decoder": 0.8, "likelihood": 0.7}
    for name, changed in {"a": {}, "b": {"cut": "layer3"}, "c": {"seed": 1}, "d": {}}.items():
        write(tmp_path / name, facts(name, "noise", 0.9, both, knob="std", strength=1, **changed))
    assert sorted(titles(compare([tmp_path])).values()) == [
        "noise, σ 1, layer2, seed 0, a",
        "noise, σ 1, layer2, seed 0, d",
        "noise, σ 1, layer2, seed 1",
        "noise, σ 1, layer3",
    ]


def test_names_from_facts_are_text(tmp_path):
    found = small(tmp_path, HOSTILE, defense=HOSTILE, variant=HOSTILE, group=HOSTILE, knob=HOSTILE, strength=1)
    page = Page(render_comparison(found, pictures(found)))
    assert HOSTILE in page.text
    assert "script" not in {tag for tag, _ in page.tags}


# The drawing


def drawn(groups, **changed):
    knobs = {"floor": 0.1, "fronts": [[(0.2, 0.5), (0.6, 0.9)]], "leaks_right": True} | changed
    return scatter_chart(
        identifier="x", title="t", description="d", groups=groups, x_title="x", y_title="y", x_number=str, y_number=str,
        **knobs,
    )  # fmt: skip


def spot(x, y, **changed):
    known = {"label": "a", "text": "", "told": "a: 1", "is_on_front": False} | changed
    return Spot(x=Point(value=x, low=x - 0.05, high=x + 0.05), y=Point(value=y, low=y - 0.1, high=y + 0.1), **known)


def test_the_front_is_stairs_to_the_side_that_leaks():
    group = Group(name="g", number=1, spots=(spot(0.2, 0.5), spot(0.6, 0.9)), is_joined=True)
    right = re.search(r'class="front" d="M([^"]*)"', drawn([group]))[1]
    corners = [tuple(map(float, corner.split())) for corner in right.split("L")]
    # Across at the height of the first, up at the second, on to the right edge.
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = corners[-4:]
    assert x1 < x2 == x3 < x4 == 878
    assert y1 == y2 > y3 == y4
    left = re.search(
        r'class="front" d="M([^"]*)"', drawn([group], fronts=[[(0.6, 0.5), (0.2, 0.9)]], leaks_right=False)
    )
    assert left[1].split("L")[-1].split()[0] == "74.0"


def test_defenses_differ_in_color_or_marker():
    def key(number):
        return group_key(Group(name="g", number=number, spots=(), is_joined=False))

    assert len({str(key(number)) for number in range(37)}) == 37


def test_names_do_not_cover_each_other():
    groups = [
        Group(name=f"defense {i}", number=i, spots=(spot(0.5 + i / 500, 0.5, text="1"),), is_joined=True)
        for i in range(1, 9)
    ]
    placed = re.findall(r'<text class="label s\d" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', str(drawn(groups)))
    assert sorted(name for *_, name in placed) == [f"defense {i}" for i in range(1, 9)]
    boxes = [(float(x), float(y) - 11, float(x) + 7 * len(name), float(y)) for x, y, name in placed]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_lone_split_and_endless_intervals_are_drawn():
    told = str(drawn([Group(name="g", number=1, spots=(spot(0.1, 0.5),), is_joined=True)], fronts=[[(0.1, 0.5)]]))
    assert "nan" not in told
    endless = replace(spot(0.1, 0.5), x=Point(value=0.1, low=float("-inf"), high=float("inf")))
    told = str(drawn([Group(name="g", number=1, spots=(endless,), is_joined=True)], fronts=[[(0.1, 0.5)]]))
    assert "inf" not in re.sub(r"<title.*?</title>", "", told)


# As a reader meets it


@pytest.fixture(scope="module")
def open_page(browser, tmp_path_factory):
    pages = []

    def opened(found, *, width=1280, scheme="light"):
        path = write_comparison(found, pictures(found), tmp_path_factory.mktemp("page") / "comparison.html")
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


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_alone_with_contrast(open_page, found, scheme):
    page = open_page(found, scheme=scheme)
    assert page.complaints == []
    assert [url[:40] for url in page.asked if not url.startswith("data:")] == [page.url[:40]]
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth === 32)")
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    seen = page.evaluate(CONTRAST)
    assert len(seen) > 600
    assert [entry for entry in seen if entry[0] < 4.5] == []
    outside = """() => {
      const svg = document.querySelector('svg.scatter'), edge = svg.viewBox.baseVal;
      return [...svg.querySelectorAll('text')].map((t) => [t.getBBox(), t.textContent]).filter(([b]) =>
        b.x < 0 || b.y < 0 || b.x + b.width > edge.width || b.y + b.height > edge.height).map(([, text]) => text);
    }"""
    assert page.evaluate(outside) == []


@pytest.mark.browser
def test_nothing_is_wider_than_the_window_or_the_paper(open_page, found):
    page = open_page(found, scheme="dark")
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    for width in (320, 768):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 688, "height": 800})  # A4 less its margins
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    hidden = "[...document.querySelectorAll('td, th, img')].filter((n) => !n.checkVisibility()).length"
    assert page.evaluate(hidden) == 0
    clipped = (
        "[...document.querySelectorAll('table')].filter((t) => t.scrollWidth > t.parentElement.clientWidth + 1)"
        ".map((t) => t.innerText.slice(0, 40))"
    )
    assert page.evaluate(clipped) == []


@pytest.mark.browser
def test_long_and_hostile_names_neither_run_nor_widen_the_page(open_page, tmp_path):
    long = "W" * 120
    found = small(tmp_path, HOSTILE, defense=long, variant=HOSTILE, group=long, knob=long, strength=1)
    page = open_page(found, width=360)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate("window.broken === undefined")
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.browser
def test_the_keyboard_reaches_every_table_and_drawing(open_page, found):
    page = open_page(found)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "found"
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        reached.add(page.evaluate("document.activeElement.ariaLabel"))
    regions = page.evaluate(
        "[...document.querySelectorAll('.scroll, .drawing')].filter((r) => r.checkVisibility()).map((r) => r.ariaLabel)"
    )
    assert len(regions) > 15
    assert set(regions) <= reached
