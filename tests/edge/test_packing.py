"""The body of a request: what decodes from it, and how little its length says."""

from __future__ import annotations

import gzip
import io
import math
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from louver.edge import Settings
from louver.edge.packing import bucket, pack
from louver.errors import ConfigError


def unpacked(body: bytes, compression: str) -> bytes:
    if compression == "none":
        return body
    if compression == "gzip":
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)  # as servers do: one member, and nothing after it
        out = inflate.decompress(body)
        assert inflate.eof
        assert inflate.unused_data == b""
        assert out == gzip.decompress(body)
        return out
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body), read_across_frames=True) as reader:
        return reader.read()


def mixed(n_bytes: int, entropy: int, seed: int = 0) -> bytes:
    """Bytes that compress the better the lower their entropy (in bits a byte)."""
    return np.random.default_rng(seed).integers(0, 2**entropy, n_bytes).astype(np.uint8).tobytes()


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
@pytest.mark.parametrize("n_bytes", [1, 80, 511, 70_001])
@pytest.mark.parametrize("entropy", [0, 3, 8])
def test_what_is_packed_comes_out(n_bytes: int, entropy: int, compression: str, is_padded: bool) -> None:
    content = mixed(n_bytes, entropy)
    body = pack(content, Settings(compression=compression, is_padded=is_padded))
    assert unpacked(body, compression) == content


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40_000),
    st.sampled_from([0, 1, 5, 8]),
    st.sampled_from(["zstd", "gzip"]),
    st.sampled_from([1, 4, 16]),
)
def test_lengths_are_the_fixed_ones_whatever_the_content(
    n_bytes: int, entropy: int, compression: str, per_doubling: int
) -> None:
    content = mixed(n_bytes, entropy, seed=n_bytes)
    body = pack(content, Settings(compression=compression, buckets_per_doubling=per_doubling))
    most = n_bytes + n_bytes // 256 + 128 + 8
    assert len(body) == bucket(len(body), per_doubling) or len(body) == most
    assert len(body) <= max(512, most)
    assert unpacked(body, compression) == content


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_pictures_of_different_entropy_fall_in_few_lengths(compression: str) -> None:
    contents = []
    for i in range(40):  # as of features behind a ReLU, some busier than others
        rng = np.random.default_rng(i)
        is_active = rng.random(60_000) < 0.53 + 0.001 * i
        contents.append((rng.integers(1, 90, 60_000) * is_active).astype(np.uint8).tobytes())
    plain = {len(pack(c, Settings(compression=compression, is_padded=False))) for c in contents}
    assert len(plain) > 30  # else the test shows nothing
    assert len({len(pack(c, Settings(compression=compression))) for c in contents}) <= 2
    assert len({len(pack(c, Settings(compression=compression, buckets_per_doubling=1))) for c in contents}) == 1


def test_without_compression_the_length_says_nothing() -> None:
    lengths = {len(pack(mixed(3000, entropy), Settings(compression="none"))) for entropy in range(9)}
    assert lengths == {3000}


def test_filling_up_costs_at_most_an_eighth() -> None:
    for entropy in range(1, 8):
        content = mixed(50_000, entropy)
        plain = len(pack(content, Settings(is_padded=False)))
        assert plain < len(pack(content, Settings())) <= (plain + 8) * 1.125


@pytest.mark.parametrize("per_doubling", [1, 2, 4, 8, 16])
def test_buckets_are_few_and_never_too_small(per_doubling: int) -> None:
    lengths = {bucket(length, per_doubling) for length in range(1, 20_000)}
    assert all(bucket(length, per_doubling) == length for length in lengths)
    assert min(lengths) == 512
    assert len(lengths) <= 1 + per_doubling * math.ceil(math.log2(20_000 / 512))
    assert all(length <= bucket(length, per_doubling) for length in range(1, 20_000))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": "brotli"}, "expected zstd, gzip, none, got 'brotli'"),
        ({"level": 0}, "expected 1 to 19 for zstd"),
        ({"compression": "gzip", "level": 12}, "expected 1 to 9 for gzip"),
        ({"buckets_per_doubling": 3}, "expected 1, 2, 4, 8 or 16, got 3"),
        ({"read_timeout_s": 0}, "read_timeout_s: expected seconds above 0"),
        ({"deadline_s": float("nan")}, "deadline_s: expected seconds"),
        ({"tries": 0}, "tries: expected a whole number of 1 or more"),
        ({"most_in_flight": True}, "most_in_flight: expected a whole number"),
        ({"queue_most_entries": 2.5}, "queue_most_entries: expected a whole number"),
        ({"key": "device.key"}, "expected a certificate with it"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**options)
