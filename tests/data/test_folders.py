"""Folders of pictures: classes, the re-identification layouts, and what is wrong with them."""

import numpy as np
import pytest
from PIL import Image

from louver.data import load_images
from louver.errors import DataError

LEVELS = np.random.default_rng(1).integers(0, 256, (9, 8, 10, 3), dtype=np.uint8)


def put(path, number=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(LEVELS[number]).save(path, **options)


@pytest.fixture
def classes(tmp_path):
    for number, name in enumerate(["van/b.png", "van/a.png", "bus/deep/c.PNG", "bus/d.bmp"]):
        put(tmp_path / "set" / name, number)
    (tmp_path / "set" / "van" / "Thumbs.db").write_bytes(b"no picture")
    return tmp_path / "set"


@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_a_class_a_subfolder_in_sorted_order(classes, prefix):
    loaded = load_images(f"{prefix}{classes}")
    assert loaded.classes == {"label": ("bus", "van")}
    assert loaded.labels["label"].tolist() == [0, 0, 1, 1]
    assert np.array_equal(loaded.pixels, LEVELS[[3, 2, 1, 0]].transpose(0, 3, 1, 2))
    assert load_images(f"{prefix}{classes}[1:3]").labels["label"].tolist() == [0, 1]


def test_a_flat_folder_has_no_labels(tmp_path):
    put(tmp_path / "2.png", 2)
    put(tmp_path / "1.png", 1)
    loaded = load_images(str(tmp_path))
    assert loaded.labels == {}
    assert np.array_equal(loaded.pixels[0].transpose(1, 2, 0), LEVELS[1])


def test_an_empty_class_is_an_error(classes):
    (classes / "truck").mkdir()
    with pytest.raises(DataError, match="got none in 'truck'"):
        load_images(str(classes))


def test_pictures_beside_classes_are_an_error(classes):
    put(classes / "stray.png")
    with pytest.raises(DataError, match=r"beside the folders, such as stray\.png"):
        load_images(str(classes))


def test_an_empty_folder_and_an_absent_one(tmp_path):
    with pytest.raises(DataError, match="expected pictures"):
        load_images(str(tmp_path))
    for kind in ("folder", "veri776", "market1501"):
        with pytest.raises(DataError, match="got nothing"):
            load_images(f"{kind}:{tmp_path}/absent")


@pytest.mark.parametrize("damage", [b"", b"no picture", None])
def test_a_corrupt_picture_is_named(classes, damage):
    victim = classes / "van" / "a.png"
    victim.write_bytes(victim.read_bytes()[:150] if damage is None else damage)
    with pytest.raises(DataError, match=r"van.a\.png: expected a picture"):
        load_images(str(classes))


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 10), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: expected 8 bits"):
        load_images(str(tmp_path))


def test_gray_beside_color_needs_channels(classes):
    Image.fromarray(LEVELS[5, :, :, 0]).save(classes / "van" / "c.png")
    with pytest.raises(DataError, match=r"got a gray one, .*c\.png; .*channels=3"):
        load_images(str(classes))
    assert load_images(str(classes), channels=3).pixels.shape == (5, 3, 8, 10)
    assert load_images(str(classes), channels=1).pixels.shape == (5, 1, 8, 10)


def test_transparent_and_palette_pictures_become_color(tmp_path):
    Image.fromarray(LEVELS[0]).convert("RGBA").save(tmp_path / "a.png")
    Image.fromarray(LEVELS[0]).quantize(16).save(tmp_path / "b.png", transparency=bytes(range(16)))
    assert load_images(str(tmp_path)).pixels.shape == (2, 3, 8, 10)


def test_differing_sizes_need_a_size(classes):
    Image.fromarray(LEVELS[6, :6]).save(classes / "van" / "c.png")
    with pytest.raises(DataError, match=r"got 6 x 10 in .*c\.png; load with size="):
        load_images(str(classes))
    assert load_images(str(classes), size=6).pixels.shape == (5, 3, 6, 6)
    assert load_images(str(classes), size=(4, 5)).pixels.shape == (5, 3, 4, 5)


@pytest.mark.parametrize("large", [(96, 32), (960, 320)])  # the decoder may skip some detail, and much
def test_a_resize_covers_and_crops_to_the_center(tmp_path, large):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert (load_images(str(tmp_path), size=8).pixels == 200).all()
    wide[:, 10:14] = 100
    Image.fromarray(wide).resize(large, Image.Resampling.NEAREST).save(tmp_path / "b.jpg", quality=95)
    whole = np.asarray(Image.open(tmp_path / "b.jpg").resize((24, 8), Image.Resampling.BILINEAR)).astype(int)
    small = load_images(str(tmp_path) + "[1:]", size=8).pixels[0]
    assert np.abs(small.transpose(1, 2, 0) - whole[:, 8:16]).max() < 12


@pytest.mark.parametrize("bad", [{"size": 0}, {"size": (4, -1)}, {"channels": 2}])
def test_a_wish_that_cannot_be(classes, bad):
    with pytest.raises(DataError, match="expected"):
        load_images(str(classes), **bad)


def test_market_drops_junk_and_keeps_distractors(tmp_path):
    for number, name in enumerate(["0002_c1s1_000451_03", "-1_c3s2_000001_00", "0000_c6s3_000002_01", "1501_c2s1_9_1"]):
        put(tmp_path / f"{name}.jpg", number)
    loaded = load_images(f"market1501:{tmp_path}")
    assert loaded.labels["identity"].tolist() == [0, 2, 1501]
    assert loaded.labels["camera"].tolist() == [6, 1, 2]


def test_veri_identity_and_camera(tmp_path):
    put(tmp_path / "image_train" / "0002_c002_00030600_0.jpg", 0)
    put(tmp_path / "image_train" / "0776_c019_00030601_1.jpg", 1)
    loaded = load_images(f"veri776:{tmp_path}/image_train")
    assert loaded.labels["identity"].tolist() == [2, 776]
    assert loaded.labels["camera"].tolist() == [2, 19]


@pytest.mark.parametrize("kind", ["market1501", "veri776"])
def test_a_name_of_another_layout_is_an_error(tmp_path, kind):
    put(tmp_path / "car_17.jpg")
    with pytest.raises(DataError, match=r"car_17\.jpg: expected a name like"):
        load_images(f"{kind}:{tmp_path}")


@pytest.fixture
def vehicleid(tmp_path):
    for number, name in enumerate(["0000003", "0000001", "0000002"]):
        put(tmp_path / "image" / f"{name}.jpg", number)
    (tmp_path / "train_test_split").mkdir()
    (tmp_path / "train_test_split" / "train_list.txt").write_text("0000003 12\n0000001 7\n")
    (tmp_path / "train_test_split" / "test_list_800.txt").write_text("0000002 9\n")
    return tmp_path


@pytest.mark.parametrize(
    ("place", "identity"),
    [("train", [12, 7]), ("test_list_800", [9]), ("train_test_split/train_list.txt", [12, 7])],
)
def test_vehicleid_follows_its_list(vehicleid, place, identity):
    loaded = load_images(f"vehicleid:{vehicleid}/{place}")
    assert loaded.labels["identity"].tolist() == identity
    assert len(loaded) == len(identity)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0000003 12\n0000009 7\n", r"line 2: expected the picture .*0000009\.jpg, got none; the list does not match"),
        ("0000003 twelve\n", "line 1: expected"),
        ("0000003\n", "line 1: expected"),
        ("", "got none"),
    ],
)
def test_a_list_that_does_not_match_is_an_error(vehicleid, lines, message):
    (vehicleid / "train_test_split" / "train_list.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        load_images(f"vehicleid:{vehicleid}/train")


def test_an_absent_list_names_those_there(vehicleid):
    with pytest.raises(DataError, match=r"lists found: test_list_800\.txt, train_list\.txt"):
        load_images(f"vehicleid:{vehicleid}/query")
