"""Roles are disjoint by content: copies are found however they were encoded, and small differences are differences."""

import io
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageDraw

from louver.data import assign_roles, drop_overlap, roles, streets
from louver.errors import ConfigError, DataError
from louver.types import Images

SCENES = streets(120, seed=3)


def images(pixels, name="set"):
    return Images(pixels=pixels, labels={"number": np.arange(len(pixels))}, name=name)


def nothing(like):
    return images(like.pixels[:0], "nothing")


def reencoded(pixels, quality, **options):
    out = np.empty_like(pixels)
    for index, one in enumerate(pixels):
        file = io.BytesIO()
        gray = one[0] if len(one) == 1 else one.transpose(1, 2, 0)
        Image.fromarray(gray).save(file, "JPEG", quality=quality, **options)
        levels = np.asarray(Image.open(file))
        out[index] = levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)
    return out


def resized(pixels, side, method):
    each = (np.asarray(Image.fromarray(one.transpose(1, 2, 0)).resize((side, side), method)) for one in pixels)
    return np.stack(list(each)).transpose(0, 3, 1, 2)


def found(ours, theirs):
    pairs = list(roles._same_pictures(images(ours), images(theirs)))
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)


def share_found(original, copy):
    pairs = found(copy, original)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    return len(pairs) / len(copy)


def assign(**given):
    empty = nothing(given["test"])
    return assign_roles(**{"train": empty, "validation": empty, **given})


def test_disjoint_roles_come_back_as_they_were():
    train, test, auxiliary = (images(SCENES.pixels[part]) for part in (slice(0, 50), slice(50, 80), slice(80, 120)))
    result = assign(train=train, test=test, auxiliary=auxiliary)
    assert result.train is train
    assert result.test is test
    assert result.auxiliary is auxiliary
    assert len(result.validation) == 0


@pytest.mark.parametrize(
    ("copy", "how"),
    [
        (lambda one: one, "equal"),
        (lambda one: one.astype(np.float32) / np.float32(255), "equal"),
        (lambda one: reencoded(one, 80), "re-encoded"),
        (lambda one: reencoded(one, 80).astype(np.float32) / np.float32(255), "re-encoded"),
    ],
)
def test_an_overlap_is_an_error_that_names_the_first_pair(copy, how):
    leaked = np.concatenate([SCENES.pixels[50:57], SCENES.pixels[3:6], SCENES.pixels[57:70]])
    with pytest.raises(DataError, match=r"auxiliary image 7 \(mine\) and test image 3 \(theirs\): .*" + how) as caught:
        assign(test=images(SCENES.pixels[:20], "theirs"), auxiliary=images(copy(leaked), "mine"))
    assert 'on_overlap="drop"' in str(caught.value)


@pytest.mark.parametrize("pair", [("train", "validation"), ("train", "test"), ("validation", "auxiliary")])
def test_every_two_roles_are_compared(pair):
    given = {
        role: images(SCENES.pixels[10 * number : 10 * number + 10])
        for number, role in enumerate(("train", "validation", "test", "auxiliary"))
    }
    assign_roles(**given)
    given[pair[0]] = given[pair[1]]
    with pytest.raises(DataError, match=f"{pair[0]} image 0.*{pair[1]} image 0|{pair[1]} image 0.*{pair[0]} image 0"):
        assign_roles(**given)


@pytest.mark.parametrize("quality", [60, 75, 85, 95])
def test_reencoded_scenes_are_found(quality):
    assert share_found(SCENES.pixels, reencoded(SCENES.pixels, quality)) >= 0.99


def test_reencoded_before_the_loader_resized_them_is_found(generator):
    large = digit_pairs(60, 128, 150, generator)[0]
    small = resized(large, 64, Image.Resampling.BILINEAR)
    assert share_found(small, resized(reencoded(large, 60), 64, Image.Resampling.BILINEAR)) == 1.0
    assert share_found(small, resized(large, 64, Image.Resampling.BICUBIC)) >= 0.99


def digit_pairs(n, size, contrast, generator):
    """Scenes that are equal but for one stroke of three pixels in a digit of 5 x 7."""
    one = np.empty((n, size, size, 3), np.uint8)
    for picture in one:
        sheet = Image.fromarray(generator.integers(30, 220, (4, 4, 3), dtype=np.uint8)).resize((size, size), 0)
        draw = ImageDraw.Draw(sheet)
        for _ in range(6):
            x, y, wide, high = (int(v) for v in generator.integers(2, size - 4, 4))
            draw.rectangle([x, y, x + wide // 3, y + high // 3], fill=tuple(generator.integers(0, 255, 3).tolist()))
        picture[:] = np.clip(np.asarray(sheet) + generator.normal(0, 2, (size, size, 3)), 0, 255)
    other = one.copy()
    dark, light = 128 - contrast // 2, 128 + contrast // 2
    for a, b in zip(one, other, strict=True):
        x, y = generator.integers(2, size - 8, 2)
        for picture in (a, b):
            picture[y : y + 7, x : x + 5] = dark
            picture[y + 1 : y + 6, x + 1 : x + 4] = light
        a[y + 3, x + 1 : x + 4] = dark
    return one.transpose(0, 3, 1, 2), other.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("contrast", [60, 120, 200])
def test_scenes_that_differ_in_one_stroke_of_a_digit_are_different(size, contrast, generator):
    one, other = digit_pairs(60, size, contrast, generator)
    assert share_found(one, reencoded(one, 75)) >= 0.99
    assert len(found(one, other)) == 0
    assert len(found(reencoded(one, 90), reencoded(other, 90))) == 0


def test_scenes_that_differ_in_color_alone_are_different():
    red, blue = SCENES.pixels[:30].copy(), SCENES.pixels[:30].copy()
    # The same luma, so that only the color planes can tell, and too small for the sieve.
    red[:, :, 32:41, 32:41] = np.array([150, 60, 60], np.uint8)[:, None, None]
    blue[:, :, 32:41, 32:41] = np.array([60, 90, 150], np.uint8)[:, None, None]
    assert len(found(red, blue)) == 0


def test_the_last_rows_count_where_blocks_do_not_fit():
    one = np.ascontiguousarray(SCENES.pixels[:20, :1, :28, :28])
    other = one.copy()
    other[:, :, 25:, 25:] = np.where(one[:, :, 25:, 25:] > 128, one[:, :, 25:, 25:] - 60, one[:, :, 25:, 25:] + 60)
    assert len(found(one, reencoded(one, 90))) == 20
    assert len(found(one, other)) == 0


def test_the_sieve_loses_no_pair(generator):
    copies = np.concatenate([reencoded(SCENES.pixels[:20], 60), SCENES.pixels[100:110]])
    levels = copies.astype(np.float32)
    slow = {
        (i, j)
        for j, one in enumerate(SCENES.pixels.astype(np.float32))
        for i in np.flatnonzero(roles._is_reencoding(levels, np.repeat(one[None], len(levels), 0))).tolist()
    }
    assert slow == {(int(i), int(j)) for i, j in found(copies, SCENES.pixels)}
    assert len(slow) == 30


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 10), (3, 30, 17), (1, 5, 3), (3, 96, 48)])
def test_any_shape_is_compared(shape, generator):
    c, h, w = shape
    coarse = generator.integers(0, 255, (25, c, 3, 3), dtype=np.uint8)
    pixels = np.stack(
        [[np.asarray(Image.fromarray(p).resize((w, h), Image.Resampling.BICUBIC)) for p in o] for o in coarse]
    )
    assert share_found(pixels, reencoded(pixels, 90)) >= 0.96
    assert len(found(pixels[:12], pixels[12:])) == 0


def test_drop_takes_from_the_role_of_lower_priority_and_counts():
    part = SCENES.pixels
    given = {
        "test": images(part[:10]),
        "validation": images(np.concatenate([part[9:12], part[20:25]])),
        "train": images(np.concatenate([part[30:40], part[21:22], reencoded(part[2:4], 70)])),
        "auxiliary": images(np.concatenate([part[60:61], part[5:6], part[30:32], part[61:70]])),
    }
    result, dropped = drop_overlap(**given)
    assert dropped == {"test": 0, "validation": 1, "train": 3, "auxiliary": 3}
    assert result.test is given["test"]
    assert result.validation.labels["number"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert result.train.labels["number"].tolist() == list(range(10))
    assert result.auxiliary.labels["number"].tolist() == [0, *range(4, 13)]
    again = assign_roles(**given, on_overlap="drop")
    assert np.array_equal(again.train.pixels, result.train.pixels)
    assert drop_overlap(train=again.train, validation=again.validation, test=again.test, auxiliary=again.auxiliary)[
        1
    ] == dict.fromkeys(dropped, 0)


def test_an_auxiliary_set_dropped_whole_is_an_error():
    with pytest.raises(DataError, match=r"auxiliary: .*got 5 of which all.*another set"):
        assign(test=images(SCENES.pixels[:9]), auxiliary=images(SCENES.pixels[2:7]), on_overlap="drop")


@pytest.mark.parametrize("role", ["test", "auxiliary"])
def test_a_role_that_must_not_be_empty(role):
    given = {"test": images(SCENES.pixels[:9]), "auxiliary": images(SCENES.pixels[9:20])}
    with pytest.raises(DataError, match=f"{role}: expected at least one image"):
        assign(
            **{**given, role: nothing(SCENES), "train": given["test"]}
            if role == "auxiliary"
            else {**given, role: nothing(SCENES)}
        )


@pytest.mark.parametrize(
    ("pixels", "mend"),
    [(SCENES.pixels[:5, :, :32, :48], r"size=\(64, 64\)"), (SCENES.pixels[:5, :1], "channels=3")],
)
def test_roles_of_differing_shape_say_how_to_load_them(pixels, mend):
    with pytest.raises(DataError, match=f"auxiliary: .*{mend}"):
        assign(test=images(SCENES.pixels[:9]), auxiliary=images(pixels))


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ConfigError, match="on_overlap"):
        assign(test=images(SCENES.pixels[:9]), auxiliary=images(SCENES.pixels[9:20]), on_overlap="ignore")


def test_many_against_many_in_seconds_and_bounded_memory(generator):
    ours = generator.integers(0, 255, (20_000, 3, 16, 16), dtype=np.uint8)
    theirs = generator.integers(0, 255, (5_000, 3, 16, 16), dtype=np.uint8)
    theirs[4_321] = ours[19_876]
    tracemalloc.start()
    start = time.process_time()
    assert found(ours, theirs).tolist() == [[19_876, 4_321]]
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 30  # about one, on an idle machine
    assert peak < 300 << 20
