"""Compressed bodies: what comes out is what went in, and nothing costs more than it may."""

from __future__ import annotations

import gzip
import os
import time
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from louver.cloud.encoding import decode
from louver.cloud.refusals import Refusal

LIMIT = 300_000
CONTENT = os.urandom(1000) * 150


def skippable(size: int, kind: int = 0) -> bytes:
    return (0x184D2A50 + kind).to_bytes(4, "little") + size.to_bytes(4, "little") + b"\0" * size


def streamed(content: bytes) -> bytes:
    """A frame that does not tell its size, with a checksum."""
    made = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compressobj()
    return made.compress(content) + made.flush()


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(content)


GOOD = {
    "nothing": ("", CONTENT),
    "identity": ("identity", CONTENT),
    "zstd": ("zstd", zstd(CONTENT)),
    "capitals": (" ZSTD ", zstd(CONTENT)),
    "zstd of unknown size": ("zstd", streamed(CONTENT)),
    "padding after": ("zstd", zstd(CONTENT) + skippable(777)),
    "padding before and after": ("zstd", skippable(3, 15) + zstd(CONTENT) + skippable(0) + skippable(12)),
    "two frames": ("zstd", zstd(CONTENT[:100_000]) + skippable(5) + streamed(CONTENT[100_000:])),
    "an empty frame": ("zstd", zstd(CONTENT) + zstd(b"")),
    "gzip": ("gzip", gzip.compress(CONTENT)),
    "two members": ("gzip", gzip.compress(CONTENT[:7]) + gzip.compress(CONTENT[7:])),
    "deflate": ("deflate", zlib.compress(CONTENT)),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_went_in_comes_out(case):
    name, body = GOOD[case]
    assert decode(body, name, LIMIT) == CONTENT


@pytest.mark.parametrize("case", [case for case in GOOD if GOOD[case][0].strip().lower() not in ("", "identity")])
def test_the_limit_is_exact(case):
    name, body = GOOD[case]
    assert len(decode(body, name, len(CONTENT))) == len(CONTENT)
    with pytest.raises(Refusal) as refused:
        decode(body, name, len(CONTENT) - 1)
    assert refused.value.status == 413


@pytest.mark.parametrize("case", [case for case in GOOD if GOOD[case][0].strip().lower() not in ("", "identity")])
def test_every_cut_is_seen(case):
    name, body = GOOD[case]
    whole = {len(part) for part in (zstd(CONTENT), zstd(CONTENT) + skippable(0))}
    for end in {1, 4, 5, 9, len(body) // 2, len(body) - 1} - whole:
        if case == "an empty frame" and end == len(zstd(CONTENT)):
            continue
        with pytest.raises(Refusal) as refused:
            decode(body[:end], name, LIMIT)
        assert refused.value.status == 400, end


@pytest.mark.parametrize("name", ["zstd", "gzip", "deflate"])
@pytest.mark.parametrize("tail", [b"x", b"tail", b"\0" * 20])
def test_a_tail_is_refused(name, tail):
    good = {"zstd": zstd, "gzip": gzip.compress, "deflate": zlib.compress}[name](CONTENT)
    with pytest.raises(Refusal) as refused:
        decode(good + tail, name, LIMIT)
    assert refused.value.status == 400


@pytest.mark.parametrize("name", ["br", "zstd, gzip", "compress", "x"])
def test_other_encodings_are_refused_with_those_that_are_known(name):
    with pytest.raises(Refusal, match="zstd, gzip, deflate, identity") as refused:
        decode(CONTENT, name, LIMIT)
    assert refused.value.status == 415


def rle_bomb(n_blocks: int) -> bytes:
    """Four bytes for each 128 KiB: a frame of unknown size, with a window of 1 MiB."""
    block = ((2**17) << 3 | 1 << 1).to_bytes(3, "little") + b"a"
    last = ((2**17) << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"a"
    return b"\x28\xb5\x2f\xfd\x00\x50" + block * (n_blocks - 1) + last


def nested(size: int) -> bytes:
    return gzip.compress(bytes(size), 9)


BOMBS = {
    "zstd that tells": ("zstd", zstd(bytes(2**24))),
    "zstd that does not": ("zstd", rle_bomb(2000)),
    "zstd that lies": ("zstd", zstd(bytes(2**24))[:5] + b"\x01" + zstd(bytes(2**24))[6:]),
    "zstd of empty blocks": ("zstd", b"\x28\xb5\x2f\xfd\x00\x50" + b"\0\0\0" * 3_000_000),
    "zstd of empty frames": ("zstd", zstd(b"") * 300_000),
    "zstd of empty padding": ("zstd", skippable(0) * 300_000),
    "gzip": ("gzip", nested(2**24)),
    "gzip of empty members": ("gzip", gzip.compress(b"") * 300_000),
    "deflate": ("deflate", zlib.compress(bytes(2**24))),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_costs_no_more_than_the_limit(case):
    name, body = BOMBS[case]
    started = time.process_time()
    with pytest.raises(Refusal) as refused:
        decode(body, name, LIMIT)
    assert refused.value.status in (400, 413)
    assert time.process_time() - started < 0.5


def test_the_bomb_is_one():
    assert len(zstandard.ZstdDecompressor().decompress(rle_bomb(20), max_output_size=2**30)) == 20 * 2**17


@given(st.sampled_from(["zstd", "gzip", "deflate"]), st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_never_breaks_the_decoder(name, data):
    content = bytes(range(256)) * 7
    body = bytearray({"zstd": streamed, "gzip": gzip.compress, "deflate": zlib.compress}[name](content))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    status, size = 200, 0
    try:
        size = len(decode(bytes(body), name, LIMIT))
    except Refusal as refusal:
        status = refusal.status
    assert size <= LIMIT
    assert status in (200, 400, 413)
