"""Pictures in .npz and Parquet files, good and bad."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from louver.data import load_images
from louver.errors import DataError, MissingExtraError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 8, 10, 3), dtype=np.uint8)


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "set.npz", **arrays)
        return str(tmp_path / "set.npz")

    return write


@pytest.fixture
def parquet(tmp_path):
    def write(table, **options):
        pq.write_table(pa.table(table), tmp_path / "set.parquet", **options)
        return str(tmp_path / "set.parquet")

    return write


def png(levels):
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("key", ["images", "x", "pixels"])
@pytest.mark.parametrize("layout", ["last", "first"])
def test_npz_layouts(npz, key, layout):
    stored = PIXELS if layout == "last" else PIXELS.transpose(0, 3, 1, 2)
    loaded = load_images(npz(**{key: stored}))
    assert np.array_equal(loaded.pixels, PIXELS.transpose(0, 3, 1, 2))
    assert loaded.labels == {}


def test_npz_gray_and_float_pictures(npz):
    assert load_images(npz(x=PIXELS[..., 0])).image_shape == (1, 8, 10)
    floats = load_images(npz(x=PIXELS.astype(np.float64) / 255))
    assert floats.pixels.dtype == np.float32
    assert floats.pixels == pytest.approx(PIXELS.transpose(0, 3, 1, 2) / 255, abs=1e-7)


def test_npz_labels_and_window(npz):
    source = npz(
        x=PIXELS,
        y=np.array([2, 0, 1, 2, 0, 1, 2], np.uint8),
        classes=np.array(["car", "bus", "van"]),
        place=np.array(["sea", "park", "sea", "mall", "mall", "sea", "park"]),
        score=np.linspace(0, 1, 7),
    )
    loaded = load_images(source + "[-5:-1]")
    assert np.array_equal(loaded.pixels, PIXELS.transpose(0, 3, 1, 2)[2:6])
    assert loaded.labels["label"].tolist() == [1, 2, 0, 1]
    assert loaded.labels["place"].tolist() == [2, 0, 0, 2]
    assert loaded.classes == {"label": ("car", "bus", "van"), "place": ("mall", "park", "sea")}
    assert set(loaded.labels) == {"label", "place"}
    assert loaded.name == source + "[-5:-1]"


def test_npz_splits(npz):
    source = npz(x_train=PIXELS, y_train=np.arange(7), x_test=PIXELS[:3], y_test=np.arange(3), y_names=list("abcdefg"))
    assert load_images(source + "/test").labels["label"].tolist() == [0, 1, 2]
    assert load_images(source + "/train[5:]").labels["label"].tolist() == [5, 6]
    assert load_images(source + "/test").classes["label"][2] == "c"
    with pytest.raises(DataError, match="nearest: x_train"):
        load_images(source + "/trian")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"photos": PIXELS}, "expected pictures in an array named images, x, pixels"),
        ({"x": PIXELS, "images": PIXELS}, "one array of pictures"),
        ({"x": PIXELS, "y": np.arange(6)}, "expected 7 labels in 'y', one a picture, got 6"),
        ({"x": PIXELS, "y": np.arange(7) / 3}, "integers or strings in label array 'y'"),
        ({"x": PIXELS, "y": np.arange(7), "classes": np.array(["a", "b"])}, "names do not match"),
        ({"x": PIXELS, "y": np.arange(7), "label": np.arange(7)}, "one column 'label'"),
        ({"x": np.zeros((7, 8, 10, 4), np.uint8)}, "drop any alpha"),
        ({"x": np.zeros((7, 3, 10, 3), np.uint8)}, "may be either"),
        ({"x": np.zeros((0, 8, 10, 3), np.uint8)}, "at least one picture"),
        ({"x": PIXELS.astype(np.int64)}, "convert them to uint8"),
        ({"x": PIXELS.astype(np.float32)}, r"in \[0,1\]"),
        ({"x": np.full((2, 8, 10, 3), -0.1)}, r"in \[0,1\]"),
        ({"x": np.full((2, 8, 10, 3), np.nan)}, "NaN"),
        ({"x": np.array([{}, {}], dtype=object)}, "without object arrays"),
    ],
)
def test_npz_refusals(npz, arrays, message):
    source = npz(**arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_images(source)
    assert "set.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_damaged_npz_is_named(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz: expected a \.npz file"):
        load_images(str(tmp_path / "bad.npz"))
    with pytest.raises(DataError, match=r"absent\.npz, got none"):
        load_images(str(tmp_path / "absent.npz"))


def test_a_window_that_holds_nothing_is_an_error(npz):
    with pytest.raises(DataError, match=r"at least one image in \[9:\], got none of 7"):
        load_images(npz(x=PIXELS) + "[9:]")


def test_parquet_as_hugging_face_writes_it(parquet):
    header = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    content = pa.array([{"bytes": png(one), "path": None} for one in PIXELS])
    table = pa.table({"image": content, "label": [0, 1, 1, 0, 1, 0, 1], "place": list("baabbba"), "score": [0.5] * 7})
    source = parquet(table.replace_schema_metadata({"huggingface": json.dumps(header)}), row_group_size=3)
    loaded = load_images(source + "[2:5]")
    assert np.array_equal(loaded.pixels, PIXELS.transpose(0, 3, 1, 2)[2:5])
    assert {name: values.tolist() for name, values in loaded.labels.items()} == {"label": [1, 0, 1], "place": [0, 1, 1]}
    assert loaded.classes == {"label": ("cat", "dog"), "place": ("a", "b")}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("group", [2, 100])
def test_parquet_nested_and_binary(parquet, fixed, group):
    kind = pa.uint8()
    for length in PIXELS.shape[:0:-1]:
        kind = pa.list_(kind, length if fixed else -1)
    source = parquet({"pixels": pa.array(PIXELS.tolist(), kind), "y": range(7)}, row_group_size=group)
    loaded = load_images(source + "[1:6]")
    assert np.array_equal(loaded.pixels, PIXELS.transpose(0, 3, 1, 2)[1:6])
    assert loaded.labels["label"].tolist() == [1, 2, 3, 4, 5]
    binary = load_images(parquet({"photo": [png(one) for one in PIXELS]}), size=4)
    assert binary.pixels.shape == (7, 3, 4, 4)


def test_parquet_reads_only_the_row_groups_asked_for(parquet):
    content = [b"broken"] * 6 + [png(PIXELS[6])]
    assert len(load_images(parquet({"image": content}, row_group_size=2) + "[6:]")) == 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"y": [1, 2]}, "expected a column of pictures"),
        ({"a": [b"1"], "b": [b"2"]}, "one column of pictures, got a and b"),
        ({"image": [png(PIXELS[0]), b"broken"]}, "row 1: expected a picture"),
        ({"image": [png(PIXELS[0]), None]}, "row 1: expected an encoded picture"),
        ({"image": [png(PIXELS[0]), png(PIXELS[1, :4])]}, "got 4 x 10 in .*row 1.*size="),
        ({"image": [png(PIXELS[0]), png(PIXELS[1, :, :, 0])]}, "got a gray one, .*row 1.*channels=3"),
        ({"image": [png(PIXELS[0])], "y": pa.array([None], pa.int64())}, "label in every row"),
        ({"image": [[1, 2, 3]]}, "flat lists"),
        ({"image": [[[1, 2], [3]]]}, "rows that differ"),
    ],
)
def test_parquet_refusals(parquet, table, message):
    source = parquet(table)
    with pytest.raises(DataError, match=message):
        load_images(source)


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"bad\.parquet: expected a Parquet file"):
        load_images(str(tmp_path / "bad.parquet"))


@pytest.mark.parametrize(("module", "suffix"), [("pyarrow", "parquet"), ("PIL.Image", "parquet")])
def test_a_missing_package_is_named(parquet, monkeypatch, module, suffix):
    source = parquet({"image": [png(PIXELS[0])]})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'louver\[lab\]'"):
        load_images(source)
