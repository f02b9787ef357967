"""The real images: every set by name, and what counts as the same picture among them."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from louver.data import DATA_NAMES, data_root, load_images, packed, roles
from louver.errors import DataError
from louver.types import Images

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(data_root() is None, reason="real images not found: set LOUVER_DATA"),
]

# Source, shape, label columns. Counts are those that the sets' own README states.
SOURCES = [
    ("cifar10/test", (10_000, 3, 32, 32), {"label"}),
    ("cifar10/train[-2600:]", (2_600, 3, 32, 32), {"label"}),
    ("cifar10[49990:50020]", (30, 3, 32, 32), {"label", "split"}),
    ("cifar100[:9]", (9, 3, 32, 32), {"label"}),
    ("fashion_mnist/train[59000:]", (1_000, 1, 28, 28), {"label"}),
    ("celeba299_faces[5827:]", (10, 3, 128, 128), {"identity", "female", "split", "group"}),
    ("celeba299_faces/attackers/test[:20]", (20, 3, 128, 128), {"identity", "female", "split", "group"}),
    ("vehicle_reid/val", (204, 3, 128, 128), {"identity", "camera", "type", "split"}),
    ("vehicle_reid/test", (120, 3, 128, 128), {"identity", "camera", "type", "split"}),
    ("imagenet1000[-7:]", (7, 3, 128, 128), {"label"}),
]


@pytest.mark.parametrize(("source", "shape", "columns"), SOURCES)
def test_a_set_by_name(source, shape, columns):
    loaded = load_images(source)
    assert loaded.pixels.shape == shape
    assert loaded.pixels.dtype == np.uint8
    assert set(loaded.labels) == columns
    assert 10 < loaded.pixels.std() < 120
    for column, names in loaded.classes.items():
        assert loaded.labels[column].max() < len(names)


def test_every_name_is_tried():
    assert {source.split("/")[0].split("[")[0] for source, *_ in SOURCES} == set(DATA_NAMES)


def test_windows_agree_with_the_whole():
    whole = load_images("fashion_mnist/test")
    part = load_images("fashion_mnist/test[2840:5710]")  # the ends of three mosaics
    assert np.array_equal(part.pixels, whole.pixels[2840:5710])
    assert part.labels["label"].tolist() == whole.labels["label"][2840:5710].tolist()


def test_parts_follow_each_other_in_the_whole_set():
    both = load_images("cifar10[49999:50001]")
    assert np.array_equal(both.pixels[0], load_images("cifar10/train[-1:]").pixels[0])
    assert np.array_equal(both.pixels[1], load_images("cifar10/test[:1]").pixels[0])
    assert both.labels["split"].tolist() == [0, 1]


def test_only_the_mosaics_asked_for_are_decoded(monkeypatch):
    decoded = []
    real = packed.picture
    monkeypatch.setattr(
        packed, "picture", lambda content, name, wish: decoded.append(name) or real(content, name, wish)
    )
    load_images("cifar10/test[2400:2600]")
    assert decoded == ["cifar10 mosaic 0", "cifar10 mosaic 1"]


def test_selectors_choose_by_label():
    faces = load_images("celeba299_faces/attackers/test[:50]")
    assert set(faces.labels["group"].tolist()) == {1}
    assert set(faces.labels["split"].tolist()) == {1}
    vehicles = load_images("vehicle_reid/validation")
    assert np.unique(vehicles.labels["identity"]).size == 102
    assert vehicles.classes["type"] == ("car", "motorcycle", "truck", "bus")


def test_labels_are_those_of_their_pictures():
    means = np.array([0.49139968, 0.48215841, 0.44653091])  # of all 50,000, as the README states
    assert load_images("cifar10/train[:5000]").pixels.mean((0, 2, 3)) / 255 == pytest.approx(means, abs=0.01)
    assert load_images("imagenet1000[207:208]").classes["label"][207] == "golden_retriever"
    assert load_images("cifar10/test[:4]").labels["label"].tolist() == [1, 5, 3, 1]  # golden: seen on a contact sheet


def test_an_unknown_split_lists_the_legal():
    with pytest.raises(DataError, match="no split 'tset'; nearest: test"):
        load_images("vehicle_reid/tset")
    with pytest.raises(DataError, match="cifar100: no split"):
        load_images("cifar100/train")


@pytest.mark.parametrize("damage", ["cut", "blob"])
def test_a_damaged_set_is_named(tmp_path, monkeypatch, damage):
    whole = (data_root() / "vehicle_reid.npz").read_bytes()
    if damage == "cut":
        (tmp_path / "vehicle_reid.npz").write_bytes(whole[: len(whole) // 2])
    else:
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(tmp_path / "vehicle_reid.npz", "w") as new:
            for member in old.namelist():
                content = old.read(member)
                new.writestr(member, content[:128] + bytes(len(content) - 128) if member == "x__jpeg.npy" else content)
    monkeypatch.setenv("LOUVER_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"vehicle_reid(\.npz: expected a whole| image 0: expected a picture)"):
        load_images("vehicle_reid[:3]")


def jpeg(pixels, quality):
    out = np.empty_like(pixels)
    for index, one in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(one[0] if len(one) == 1 else one.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        levels = np.asarray(Image.open(file))
        out[index] = levels if levels.ndim == 2 else levels.transpose(2, 0, 1)
    return out


def found(ours, theirs):
    pairs = list(roles._same_pictures(Images(pixels=ours), Images(pixels=theirs)))
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)


@pytest.mark.parametrize("quality", [60, 75, 95])
@pytest.mark.parametrize(
    "source", ["cifar10/test[:1500]", "vehicle_reid[:200]", "celeba299_faces[:200]", "fashion_mnist/test[:1500]"]
)
def test_reencoded_real_pictures_are_found(source, quality):
    pixels = load_images(source).pixels
    pairs = found(jpeg(pixels, quality), pixels)
    assert np.mean(pairs[:, 0] == pairs[:, 1]) == 1.0
    assert len(pairs) >= 0.99 * len(pixels)


def test_different_real_pictures_are_different():
    train, test = load_images("cifar10/train[:7500]").pixels, load_images("cifar10/test").pixels
    assert len(found(train, test)) == 0
    vehicles = load_images("vehicle_reid")
    first, second = (vehicles.pixels[vehicles.labels["camera"] == camera] for camera in (1, 2))
    assert len(found(first, second)) == 0  # the same vehicles, seen by another camera


def test_twins_in_fashion_mnist_are_found():
    # Seen with one's own eyes: the same coat, photographed once and listed twice.
    train, test = load_images("fashion_mnist/train[:7000]").pixels, load_images("fashion_mnist/test").pixels
    assert found(train, test).tolist() == [[6300, 6210]]
