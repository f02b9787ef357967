from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from louver.errors import DataError
from louver.report import figures


def chart(series, **knobs):
    settings = {"identifier": "c", "title": "T", "description": "D", "places": ["a", "b", "c"], "number": "{:g}".format}
    return figures.line_chart(series=series, **(settings | knobs))


def line(*values, name="Decoder"):
    return figures.Series(
        name=name, points=tuple(None if v is None else figures.Point(value=v, low=v - 1, high=v + 1) for v in values)
    )


def parts(svg, css):
    tree = ElementTree.fromstring(str(svg))
    return [node for node in tree.iter() if node.get("class", "").split()[:1] == [css]]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_survives_its_data_uri(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, channels), dtype=np.uint8)
    held = base64.b64decode(figures.picture_uri(pixels).removeprefix("data:image/png;base64,"))
    back = np.asarray(Image.open(io.BytesIO(held)))
    assert np.array_equal(back.reshape(pixels.shape), pixels)


@pytest.mark.parametrize("pixels", [np.zeros((8, 10), np.uint8), np.zeros((8, 10, 3), np.float32)])
def test_a_picture_of_another_kind_is_refused(pixels):
    with pytest.raises(DataError, match="expected a uint8 picture"):
        figures.picture_uri(pixels)


@pytest.mark.parametrize(("size", "shown"), [((32, 32), (96, 96)), ((8, 10), (88, 110)), ((512, 256), (256, 128))])
def test_small_pictures_grow_by_whole_steps_and_large_ones_shrink(size, shown):
    assert figures.picture_size(*size) == shown


@pytest.mark.parametrize(
    ("low", "high", "base", "ticks"),
    [
        (0.0, 1.0, 1000, [0, 0.25, 0.5, 0.75, 1]),
        (12.1, 33.9, 1000, [10, 20, 30, 40]),
        (0, 65536, 1024, [0, 20480, 40960, 61440, 81920]),
        (5.0, 5.0, 1000, [4.5, 4.75, 5, 5.25, 5.5]),
        (0.0, 0.0, 1000, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_cover(low, high, base, ticks):
    assert figures.nice_ticks(low, high, base=base) == pytest.approx(ticks)


def test_lines_go_up_with_their_values_and_stay_inside():
    svg = chart([line(1.0, 2.0, 4.0)])
    (drawn,) = parts(svg, "line")
    heights = [float(pair.split()[1]) for pair in drawn.get("d")[1:].split("L")]
    assert heights == sorted(heights, reverse=True)
    assert all(14 <= y <= 290 for y in heights)


def test_a_missing_or_endless_value_leaves_a_gap():
    five = ["a", "b", "c", "d", "e"]
    assert len(parts(chart([line(1, 2, 3, 4, 5)], places=five), "line")) == 1
    for hole in (None, float("inf"), float("nan")):
        svg = chart([line(1, 2, hole, 4, 5)], places=five)
        assert len(parts(svg, "line")) == 2
        assert len(parts(svg, "mark")) == 4
        assert not re.search(r"\b(nan|inf)\b", str(svg))


def test_lines_differ_without_color():
    seen = {(figures._style(i)[1], figures.marker_path(i, 0, 0)) for i in range(6)}
    assert len(seen) == 6
    assert len({figures.series_key(i) for i in range(18)}) == 18


def test_end_labels_do_not_overlap():
    svg = chart([line(1, 1, 1, name=f"attack {i}") for i in range(6)], floor=[1, 1, 1])
    heights = sorted(float(node.get("y")) for css in ("label", "floor-label") for node in parts(svg, css))
    assert len(heights) == 7
    assert min(np.diff(heights)) >= 14.9


def test_names_are_escaped_and_the_drawing_names_itself():
    svg = chart([line(1, 2, 3, name="<b>&")], title="<script>", places=["<i>", "b", "c"])
    tree = ElementTree.fromstring(str(svg))
    assert tree.get("role") == "img"
    assert [child.text for child in tree][:2] == ["<script>", "D"]
    assert tree.get("aria-labelledby").split() == [child.get("id") for child in tree][:2]


def test_one_place_has_a_point_and_a_floor():
    svg = chart([line(1.0)], places=["a"], floor=[0.5])
    assert (len(parts(svg, "line")), len(parts(svg, "mark")), len(parts(svg, "floor"))) == (0, 1, 1)
