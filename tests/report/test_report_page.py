from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from louver.errors import DataError, StorageError
from louver.report import render, words, write_report
from louver.types import Check, Threat, Verdict

HOSTILE = "<script>window.broken=1</script><img src=x onerror=alert(1)>\"'&"


class Page(HTMLParser):
    """Tags and text of a page, and a complaint for every tag that does not close."""

    VOID = frozenset({"meta", "img", "path", "circle", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def test_every_row_is_told_with_floor_and_intervals(make_audit):
    audit = make_audit()
    text = Page(render(audit)).text
    for row in audit.rows:
        for value in (
            row.mean,
            row.low,
            row.high,
            row.worst,
            row.worst_low,
            row.floor,
            row.floor_high,
            row.floor_worst,
        ):
            assert re.sub(r"\s", " ", words.value_in_words(row.measure, row.unit, value)) in text, row
        assert f"{row.n_images:,}" in text


def test_rows_stand_at_their_own_cut_and_measure(make_audit):
    audit = make_audit()
    marked = replace(audit.rows[7], mean=123.4567, n_images=98_765, beats_floor=False)
    page = render(replace(audit, rows=(*audit.rows[:7], marked, *audit.rows[8:])))
    section = page.split('id="findings"')[1].split(f'<h3 id="cut-1">Cut at {marked.cut}')[1].split("<h3")[0]
    (line,) = [line for line in section.split("<tr>") if "98,765" in line]
    assert f'<th scope="row">{marked.attack}</th><td>123.5 ' in line
    assert ">no</td>" in line


def test_the_strongest_attack_follows_the_direction(make_audit):
    for n_measures, measure in ((1, "mse"), (3, "ssim")):
        audit = make_audit(n_measures=n_measures)
        rows = [row for row in audit.rows if row.cut == "layer1" and row.measure == measure]
        best = (min if measure == "mse" else max)(rows, key=lambda row: row.mean)
        glance = render(audit).split('id="glance"')[1].split("</section>")[0]
        (line,) = [line for line in glance.split("<tr>") if ">layer1</a>" in line]
        assert f">{best.attack}</td>" in line


def test_a_mean_that_is_no_number_is_never_the_strongest_nor_hidden(make_audit):
    audit = make_audit(cuts=["a"], attacks=["First", "Second"], n_measures=3)
    rows = tuple(replace(row, mean=math.nan) if row.attack == "First" else row for row in audit.rows)
    page = render(replace(audit, rows=rows))
    assert ">Second</td>" in page.split('id="glance"')[1].split("</section>")[0]
    assert "undefined" in page.split('id="findings"')[1]


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        (Verdict(passed=True, headline="fine", checks=(Check(rule="r", status="holds", reason="x"),)), "Passed"),
        (Verdict(passed=False, headline="", checks=(Check(rule="r", status="broken", reason="x"),)), "Broken"),
        (Verdict(passed=False, headline="", checks=(Check(rule="r", status="not shown", reason="x"),)), "Not shown"),
        (Verdict(passed=True, headline="", checks=()), "Nothing judged"),
    ],
)
def test_the_verdict_comes_first_in_words(make_audit, verdict, word):
    page = render(make_audit(verdict=verdict))
    assert f"<title>{word}: " in page
    main = Page(page).text.split("attacker: full access")[1]
    assert main.index("Verdict:") < main.index(word) < main.index("The attacker")
    assert main.split("Verdict:")[1].split()[: len(word.split())] == word.split()


def test_checks_and_warnings_are_all_told(make_audit):
    audit = make_audit()
    text = Page(render(audit)).text
    for check in audit.verdict.checks:
        assert check.rule in text
        assert check.reason in text
    assert all(warning in text for warning in audit.verdict.warnings)


def test_everything_from_outside_is_escaped(make_audit, make_panels):
    audit = make_audit(
        cuts=[HOSTILE, "b"],
        attacks=[HOSTILE],
        name=HOSTILE,
        threat=Threat(name=HOSTILE),
        config={HOSTILE: [HOSTILE, {"x": Path(HOSTILE)}]},
        verdict=Verdict(
            passed=False,
            headline=HOSTILE,
            checks=(Check(rule=HOSTILE, status="broken", reason=HOSTILE),),
            warnings=(HOSTILE,),
        ),
    )
    audit = replace(audit, environment={HOSTILE: HOSTILE}, utility={HOSTILE: 0.5})
    audit = replace(audit, rows=tuple(replace(row, measure=HOSTILE, unit=HOSTILE) for row in audit.rows[:1]))
    panels = [replace(panel, title=HOSTILE, captions=(HOSTILE,) * 6) for panel in make_panels(audit)]
    page = Page(render(audit, panels))
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "object", "link", "form"} == set()
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in page.tags if tag == "img")
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert page.text.count("window.broken=1") > 10


def test_no_address_but_its_own(make_audit, make_panels):
    audit = make_audit()
    page = render(audit, make_panels(audit))
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    held = Page(page)
    ids = [attributes["id"] for _, attributes in held.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in held.tags:
        for name in ("href", "aria-labelledby"):
            assert {target.lstrip("#") for target in (attributes.get(name) or "").split()} <= set(ids)


def test_tables_pictures_and_headings_carry_their_names(make_audit, make_panels):
    audit = make_audit()
    page = Page(render(audit, make_panels(audit)))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table") > 10
    assert tags.count("title") == 1 + tags.count("desc")
    assert all(attributes.get("scope") in {"row", "col", "rowgroup"} for tag, attributes in page.tags if tag == "th")
    assert all(len(attributes["alt"]) > 10 for tag, attributes in page.tags if tag == "img")
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert next(attributes for tag, attributes in page.tags if tag == "html")["lang"] == "en"


def test_pictures_are_all_there_under_their_cut(make_audit, make_panels):
    audit = make_audit()
    page = Page(render(audit, make_panels(audit, k=10)))
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(alts) == 4 * 2 * 4 * 10  # cuts, panels, the truth and three attacks, pictures
    assert sum(alt.startswith("True picture: ") for alt in alts) == 80
    assert "Typical pictures, 1 to 5 of 10" in page.text


def test_pictures_at_a_cut_that_the_audit_does_not_list_are_not_lost(make_audit, make_panels):
    audit = make_audit(cuts=["a", "b"])
    assert "Cut at elsewhere" in render(audit, [replace(make_panels(audit)[0], cut="elsewhere")])


@pytest.mark.parametrize("field", ["captions", "attacks", "truth"])
def test_a_panel_that_does_not_match_itself_is_refused(make_audit, make_panels, field):
    audit = make_audit()
    panel = make_panels(audit)[0]
    broken = {
        "captions": {"captions": panel.captions[:-1]},
        "attacks": {"attacks": {"Decoder": panel.truth[:-1]}},
        "truth": {"truth": panel.truth.astype(np.float32)},
    }[field]
    with pytest.raises(DataError, match="expected"):
        render(audit, [replace(panel, **broken)])


def test_long_names_of_cuts_are_numbered_everywhere(make_audit):
    names = [f"features.denseblock{i}.denselayer{i}.relu" for i in range(3)]
    page = render(make_audit(cuts=names))
    assert f'<h3 id="cut-2">Cut at 2. {names[1]}</h3>' in page
    assert "numbered as in the table" in page
    assert "numbered as in the table" not in render(make_audit())


def test_nothing_found_is_a_page_too(make_audit):
    audit = make_audit(cuts=[], verdict=Verdict(passed=True, headline="", checks=()), config={})
    text = Page(render(audit)).text
    assert "Nothing judged" in text
    assert "0 cuts, 0 attacks" in text


def test_a_row_at_an_unlisted_cut_is_not_lost(make_audit):
    audit = make_audit()
    page = render(replace(audit, cuts=audit.cuts[:2]))
    assert "Cut at layer3" in page


def test_the_configuration_can_be_read_back(make_audit):
    page = Page(render(make_audit(config={"b": {"c": frozenset({"z", "a"})}, "a": ("ü", 1.5, None)})))
    held = next(text for text in page.texts if text.startswith("{"))
    assert json.loads(held) == {"b": {"c": ["a", "z"]}, "a": ["ü", 1.5, None]}


def test_writing_replaces_the_report_whole(make_audit, tmp_path):
    path = tmp_path / "runs" / "one" / "report.html"
    assert write_report(make_audit(name="first"), [], path) == path
    assert write_report(make_audit(name="second \udcff"), [], path) == path
    assert "second \\udcff" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_refusing_disk_keeps_the_report_before(make_audit, tmp_path, monkeypatch):
    path = write_report(make_audit(name="first"), [], tmp_path / "report.html")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        write_report(make_audit(name="second"), [], path)
    assert "first" in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_a_folder_is_refused(make_audit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_report(make_audit(), [], tmp_path / "file" / "report.html")
