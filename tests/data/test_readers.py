"""What a source string means, and the sources that need nothing from outside."""

import gzip
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from louver.data import data_root, load_images, readers, streets
from louver.data.windows import Window, split_window
from louver.errors import DataError, MissingExtraError


@pytest.mark.parametrize(
    ("source", "body", "window"),
    [
        ("cifar10/train[:40000]", "cifar10/train", Window(None, 40000)),
        ("a[1:2]/b.npz[3:-1]", "a[1:2]/b.npz", Window(3, -1)),
        ("market1501:C:/x", "market1501:C:/x", Window()),
        ("x[:]", "x", Window()),
        ("x[1:2:3]", "x[1:2:3]", Window()),
        ("x[-:2]", "x[-:2]", Window()),
    ],
)
def test_windows_are_read_from_the_end(source, body, window):
    assert split_window(source) == (body, window)


@pytest.mark.parametrize(
    "source", ["cifar11/train", "streetz/7", "absent/folder", "x.npz.txt", "folder", "a.parquet/train"]
)
def test_an_unknown_source_lists_what_there_is(source):
    with pytest.raises(DataError, match="expected a data set"):
        load_images(source)


def test_the_nearest_name_is_offered():
    with pytest.raises(DataError, match="nearest: cifar10"):
        load_images("cifar01/train")


def test_a_path_that_exists_as_spelled_wins(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 8, 10, 3), np.uint8))
    odd = tmp_path / "set.npz[1:2]"
    odd.mkdir()
    (tmp_path / "x.npz").rename(odd / "x.npz")
    assert len(load_images(f"{odd}/x.npz[1:]")) == 3
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(odd / "a.png")
    assert len(load_images(str(odd))) == 1


def test_streets_by_seed():
    made = streets(9, seed=7)
    loaded = load_images("streets/7[4:9]")
    assert np.array_equal(loaded.pixels, made.pixels[4:])
    assert loaded.labels["place"].tolist() == made.labels["place"][4:].tolist()
    assert loaded.name == "streets/7[4:9]"
    assert load_images("streets/7[:2]", size=80, channels=1).pixels.shape == (2, 1, 80, 80)
    assert load_images("streets/7[:2]", size=(24, 32)).pixels.shape == (2, 3, 24, 32)


@pytest.mark.parametrize("source", ["streets/7", "streets/7[3:]", "streets/7[-5:-1]", "streets/7[:0]", "streets/x[:3]"])
def test_streets_needs_a_seed_and_an_end(source):
    with pytest.raises(DataError, match="streets/"):
        load_images(source)


def test_float_pictures_are_resized_as_floats(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.linspace(0, 1, 2 * 8 * 10).reshape(2, 8, 10))
    loaded = load_images(str(tmp_path / "x.npz"), size=(4, 5), channels=3)
    assert loaded.pixels.dtype == np.float32
    assert loaded.pixels.shape == (2, 3, 4, 5)
    assert loaded.pixels[0].mean() == pytest.approx(np.linspace(0, 1, 160)[:80].mean(), abs=0.01)


def test_data_root_is_the_environment_s_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("LOUVER_DATA", str(tmp_path))
    assert data_root() == tmp_path
    with pytest.raises(DataError, match=r"expected the file .*cifar10\.npz, got none; set LOUVER_DATA"):
        load_images("cifar10/test")
    monkeypatch.setenv("LOUVER_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="expected a folder in LOUVER_DATA"):
        data_root()


def test_data_root_beside_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LOUVER_DATA", raising=False)
    monkeypatch.setattr(readers, "__file__", str(tmp_path / "a" / "b" / "c" / "d" / "readers.py"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert data_root() is None
    with pytest.raises(DataError, match="set LOUVER_DATA"):
        load_images("cifar10/test")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert data_root() == tmp_path / "shared" / "data"


def test_reading_needs_no_torch():
    code = "import louver.data, sys; louver.data.load_images('streets/1[:2]'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Five pictures in the files that torchvision keeps for MNIST."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(2).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part, last in (("train", 9), ("t10k", 5)):
        for kind, header, body in (
            ("images-idx3", [0x803, 5, 28, 28], pixels.tobytes()),
            ("labels-idx1", [0x801, 5], bytes([3, 1, 4, 1, last])),
        ):
            content = b"".join(number.to_bytes(4, "big") for number in header) + body
            (folder / f"{part}-{kind}-ubyte").write_bytes(content)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setenv("LOUVER_CACHE", str(tmp_path))
    monkeypatch.setenv("LOUVER_DATA", str(tmp_path))
    return pixels


def test_torchvision_sets_by_name(mnist):
    loaded = load_images("torchvision:MNIST/test[1:]")
    assert np.array_equal(loaded.pixels[:, 0], mnist[1:])
    assert loaded.labels["label"].tolist() == [1, 4, 1, 5]
    assert loaded.classes["label"][4] == "4 - four"
    train = load_images("torchvision:MNIST/train", size=16, channels=3)
    assert train.pixels.shape == (5, 3, 16, 16)
    assert train.labels["label"].tolist() == [3, 1, 4, 1, 9]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:MNISTT/test", "nearest: MNIST"),
        ("torchvision:MNIST/tset", "nearest: test"),
        ("torchvision:FakeData/train", "expected no split"),
        ("torchvision:CIFAR10/test", "allow the download, or put the files there"),
        ("torchvision:SVHN/nothing", "nothing"),
    ],
)
def test_torchvision_refusals(mnist, source, message):
    with pytest.raises(DataError, match=message):
        load_images(source)


def test_torchvision_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'louver\[lab\]'"):
        load_images("torchvision:MNIST/test")
