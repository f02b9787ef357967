import hashlib
import os
import subprocess
import sys
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import chi2_contingency, chisquare

from louver.data.streets import CLASSES, street_labels, streets
from louver.data.streets_dice import Dice
from louver.data.streets_drawing import number_plates
from louver.data.streets_scene import build_vehicles, build_world, photograph
from louver.data.streets_vehicles import BODIES, COLORS, MAX_IDENTITIES, draw_vehicles, vehicle_of
from louver.errors import DataError

# What `digest` gave when the world had been accepted by eye on its contact sheets: numpy 2.4.6 on x86-64, with and
# without vector instructions, and numpy 1.26.4. Whoever changes the world on purpose looks at a sheet, then renews it.
GOLDEN = "210fbcd1d518a2f3496bf94fdc2b31f57c605de0547f146796496a64d00f0625"
GOLDEN_IMAGES = {"n": 37, "seed": 7, "size": 48, "n_identities": 53}


def digest():
    images = streets(**GOLDEN_IMAGES)
    sha = hashlib.sha256(images.pixels.tobytes())
    for column in sorted(images.labels):
        sha.update(images.labels[column].astype("<i8").tobytes())
    return sha.hexdigest()


PRIVATE = ("place", "weather", "pedestrian", "door_number", "camera")


def p_value(a, b):
    table = np.zeros((a.max() + 1, b.max() + 1), np.int64)
    np.add.at(table, (a, b), 1)
    return chi2_contingency(table).pvalue


def test_pictures_and_labels_have_the_promised_shapes():
    images = streets(11, seed=3, size=50, n_identities=17)
    assert images.pixels.shape == (11, 3, 50, 50)
    assert images.pixels.dtype == np.uint8
    assert set(images.labels) == {"identity", "body", "color", *PRIVATE}
    for column, values in images.labels.items():
        assert values.dtype == np.int64
        assert values.shape == (11,)
        assert values.min() >= 0
        assert values.max() < (17 if column == "identity" else len(CLASSES[column]))
    assert len(CLASSES["place"]) >= 6
    assert CLASSES["door_number"][7] == "07"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n": 0}, "at least 1 picture, got n=0"),
        ({"seed": -1}, r"seed in 0\.\.2\*\*64-1, got -1"),
        ({"seed": 2**64}, "got 18446744073709551616"),
        ({"size": 47}, "size of at least 48 pixels, got 47"),
        ({"n_identities": 0}, r"n_identities in 1\.\.1536, got 0"),
        ({"n_identities": MAX_IDENTITIES + 1}, "got 1537"),
    ],
)
def test_refusals_say_what_was_expected_and_what_came(wrong, words):
    with pytest.raises(DataError, match=words):
        streets(**{"n": 3, "seed": 5, **wrong})


def test_a_picture_depends_on_seed_and_index_alone():
    few, many = streets(53, seed=12, size=48), streets(83, seed=12, size=48)
    np.testing.assert_array_equal(few.pixels, many.pixels[:53])
    for column, values in few.labels.items():
        np.testing.assert_array_equal(values, many.labels[column][:53])
    labels = street_labels(83, seed=12)
    assert all(np.array_equal(labels[column], many.labels[column]) for column in labels)


def test_bits_are_golden_with_and_without_vector_instructions():
    umath = np._core._multiarray_umath
    vector = " ".join(name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name))
    script = f"import runpy; print(runpy.run_path({__file__!r})['digest']())"
    plain = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": vector},
    )
    assert digest() == GOLDEN
    assert plain.stdout.strip() == GOLDEN


def coarse(pixels):
    """4 × 4 blocks in 16 levels: what is left of a picture without its sensor noise."""
    n, c, size, _ = pixels.shape
    blocks = pixels.reshape(n, c, size // 4, 4, size // 4, 4).astype(np.int32).sum(axis=(3, 5)) // (16 * 16)
    return {row.tobytes() for row in blocks.astype(np.uint8)}


def test_no_scene_comes_twice_within_or_across_seeds():
    first, second = (coarse(streets(800, seed=seed, size=48).pixels) for seed in (0, 1))
    assert len(first) == len(second) == 800
    assert not first & second


def test_the_world_of_vehicles_is_fixed_and_no_two_are_twins():
    body, color, livery = vehicle_of(np.arange(MAX_IDENTITIES))
    assert len(set(zip(body.tolist(), color.tolist(), livery.tolist(), strict=True))) == MAX_IDENTITIES
    vehicles = draw_vehicles(MAX_IDENTITIES, scale=64, pixel=1 / 64).astype(np.int16)
    np.testing.assert_array_equal(draw_vehicles(5, scale=64, pixel=1 / 64), vehicles[:5])
    for pair in range(0, len(BODIES) * len(COLORS), 5):  # every body and every color
        lookalikes = vehicles[(body == body[pair]) & (color == color[pair])]
        for number, vehicle in enumerate(lookalikes[:-1]):
            clearly = abs(lookalikes[number + 1 :] - vehicle).max(axis=-1) > 40
            assert clearly.sum(axis=(1, 2)).min() >= 16  # pixels of a 64-pixel picture


def test_color_says_nothing_about_the_body():
    body, color, _ = vehicle_of(np.arange(96))
    table = np.zeros((len(BODIES), len(COLORS)), np.int64)
    np.add.at(table, (body, color), 1)
    assert (table == 2).all()


# 3 seeds × 15 pairs (and 3 × 6 single columns) are tested at one chance in twenty for the whole family.
FAMILY = 0.05
INDEPENDENT = ("identity", *PRIVATE)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_private_labels_are_uniform_and_independent_of_identity_and_each_other(seed):
    labels = street_labels(120_000, seed=seed, n_identities=13)
    for column in INDEPENDENT:
        assert chisquare(np.bincount(labels[column])).pvalue > FAMILY / 18, column
    for a, b in combinations(INDEPENDENT, 2):
        assert p_value(labels[a], labels[b]) > FAMILY / 45, (a, b)


def test_the_independence_test_can_fail():
    labels = street_labels(3_000, seed=4, n_identities=13)
    assert p_value(labels["identity"], labels["body"]) < 1e-9
    rng = np.random.default_rng(0)
    leaky = np.where(rng.random(3_000) < 0.1, labels["identity"] % 8, labels["place"])
    assert p_value(labels["identity"], leaky) < 1e-6


def test_scenes_are_independent_of_identity_too():
    # Where things stand must not give away the vehicle either: two streams of throws are uncorrelated.
    n = 20_000
    dice = Dice(9, np.arange(n))
    names = ("identity", "pan", "zoom", "vehicle_x", "vehicle_scale", "door_x", "person_x", "exposure")
    throws = np.stack([dice.real(name, 0, 1).ravel().astype(np.float64) for name in names])
    correlation = np.corrcoef(throws) - np.eye(len(names))
    assert abs(correlation).max() < 4.5 / np.sqrt(n)


def retaken(images, seed, **changed):
    """The same scenes with some labels changed."""
    labels = {**images.labels, **{name: np.full(len(images), value) for name, value in changed.items()}}
    size = images.pixels.shape[-1]
    return photograph(build_world(size), build_vehicles(size, 96), labels, Dice(seed, np.arange(len(images))))


def test_a_label_changes_its_own_part_of_the_picture():
    images = streets(25, seed=6, size=64)
    without, with_person = (retaken(images, 6, pedestrian=value).astype(np.int16) for value in (0, 1))
    changed = abs(without - with_person).max(axis=1) > 24
    area = changed.mean(axis=(1, 2))
    assert area.min() > 0.015  # one cannot miss a person
    assert area.max() < 0.2
    assert not changed[:, :22].any()
    zeros, eights = (retaken(images, 6, door_number=value) for value in (0, 88))
    differs = (zeros != eights).any(axis=1)
    assert (differs.sum(axis=(1, 2)) == 10).all()  # the middle row of both digits, and nothing else
    for name in ("place", "weather", "camera"):
        a, b = (retaken(images, 6, **{name: value}).astype(np.int16) for value in (0, 3))
        assert (abs(a - b).mean(axis=(1, 2, 3)) > 8).all(), name


def read_number(picture, plates):
    """The plate that correlates best with any spot of the picture: a slow and simple reader."""
    gray = picture.astype(np.float64).mean(axis=0)
    spots = sliding_window_view(gray, plates.shape[1:]).reshape(-1, plates[0].size)
    spots = spots - spots.mean(axis=1, keepdims=True)
    ink = plates.reshape(len(plates), -1) - plates.mean(axis=(1, 2)).reshape(-1, 1)
    ink /= np.linalg.norm(ink, axis=1, keepdims=True)
    match = abs(spots @ ink.T) / (np.linalg.norm(spots, axis=1, keepdims=True) + 20)
    return match.max(axis=0).argmax()


@pytest.mark.parametrize("size", [48, 64])
def test_door_numbers_can_be_read_in_every_weather_through_every_camera(size):
    images = streets(60, seed=8, size=size)
    plates = number_plates(1).astype(np.float64)
    read = np.array([read_number(picture, plates) for picture in images.pixels])
    assert (read == images.labels["door_number"]).mean() > 0.98


def test_memory_does_not_grow_with_the_number_of_pictures():
    build_world(48)
    tracemalloc.start()
    try:
        images = streets(500, seed=5, size=48)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - images.pixels.nbytes < 48 * 2**20
