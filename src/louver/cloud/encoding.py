"""Bodies decompressed with a bound on what comes out, whatever the compressed bytes claim.

zstd (several frames, and skippable ones, which hold padding), gzip (several members) and deflate. What is cut short, or
followed by something else, is refused.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator

import zstandard

from louver.cloud.refusals import Refusal

__all__ = ["ENCODINGS", "decode"]

ENCODINGS = ("zstd", "gzip", "deflate", "identity")

_MAGIC = 0xFD2FB528
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_MOST_PARTS = 64
_STEP_IN, _STEP_OUT = 2**18, 2**20
_BLOCK_BYTES = 2**13
_SPARE_BLOCKS = 4096
_local = threading.local()  # a decompressor is for one thread at a time


def decode(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its compression.

    Raises:
        Refusal: 415 an unknown encoding; 413 more than `limit` bytes; 400 damaged, cut short, or with a tail.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        if len(body) > limit:
            raise _too_large(limit)
        return body
    if name == "zstd":
        return _zstd(body, limit)
    if name in ("gzip", "x-gzip"):
        return _zlib(body, limit, 16 + zlib.MAX_WBITS, name)
    if name == "deflate":
        return _zlib(body, limit, zlib.MAX_WBITS, name)
    raise Refusal(415, f"expected Content-Encoding {', '.join(ENCODINGS)}, one of them; got another")


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is over {limit} bytes after decompression; send fewer images in a request")


def _zlib(body: bytes, limit: int, window: int, name: str) -> bytes:
    parts: list[bytes] = []
    size = position = 0
    view = memoryview(body)
    for _ in range(_MOST_PARTS):
        stream = zlib.decompressobj(window)
        while not stream.eof:
            # In steps: the library puts together what comes out of one while no other thread can run.
            fed: bytes | memoryview = stream.unconsumed_tail
            if not fed:
                fed = view[position : position + _STEP_IN]
                position += len(fed)
            try:
                part = stream.decompress(fed, min(_STEP_OUT, limit - size + 1))
            except zlib.error as error:
                raise Refusal(400, f"the body is not {name}") from error
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            if not (fed or part or stream.eof):
                raise Refusal(400, f"the {name} body is cut short")
            parts.append(part)
        position -= len(stream.unused_data)
        if position == len(view):
            return parts[0] if len(parts) == 1 else b"".join(parts)
        if name == "deflate":
            break  # only gzip has members that follow one another
    raise Refusal(400, f"the {name} body is followed by something else")


def _zstd(body: bytes, limit: int) -> bytes:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    parts: list[bytes] = []
    size = 0
    for frame in _frames(body, limit):
        try:
            told = zstandard.frame_content_size(frame)
            if told > limit - size:
                raise _too_large(limit)
            # A frame that does not tell its size gets a buffer of what is left, of which only what is used is touched.
            part = _local.decompressor.decompress(frame, max_output_size=max(1, limit - size))
        except zstandard.ZstdError as error:
            # The walk has seen the end of the frame: what did not come out had no room.
            if "did not decompress full frame" in str(error):
                raise _too_large(limit) from error
            raise Refusal(400, "the body is not zstd") from error
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _frames(body: bytes, limit: int) -> Iterator[memoryview]:
    """The frames that hold data, found by their headers, so that a cut and a tail are seen before anything is unpacked.

    The number of blocks is bounded too: one of three bytes unpacks to nothing, and walking over millions takes seconds.
    """
    view = memoryview(body)
    position = parts = 0
    blocks = _SPARE_BLOCKS + limit // _BLOCK_BYTES
    while position < len(view):
        parts += 1
        if parts > _MOST_PARTS:
            raise Refusal(400, f"expected at most {_MOST_PARTS} zstd frames, got more")
        magic = int.from_bytes(view[position : position + 4], "little")
        if magic in _SKIPPABLE:
            if len(view) < position + 8:
                raise _cut_short()
            end = position + 8 + int.from_bytes(view[position + 4 : position + 8], "little")
            if end > len(view):
                raise _cut_short()
            position = end
            continue
        if magic != _MAGIC:
            raise Refusal(
                400, "the body is not zstd" if position == 0 else "the zstd body is followed by something else"
            )
        end, blocks = _end_of_frame(view, position, blocks)
        yield view[position:end]
        position = end


def _end_of_frame(view: memoryview, start: int, blocks: int) -> tuple[int, int]:
    """Where the frame ends, by RFC 8878, and how many blocks may still follow in others."""
    try:
        position = start + zstandard.frame_header_size(view[start : start + 18])
    except zstandard.ZstdError as error:
        raise _cut_short() from error
    has_checksum = bool(view[start + 4] & 4)
    is_last = False
    while not is_last:
        if position + 3 > len(view):
            raise _cut_short()
        blocks -= 1
        if blocks < 0:
            raise Refusal(400, "the zstd body has more blocks than its size needs; compress it in one go")
        header = int.from_bytes(view[position : position + 3], "little")
        is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == 1 else size)
    position += 4 if has_checksum else 0
    if position > len(view):
        raise _cut_short()
    return position, blocks


def _cut_short() -> Refusal:
    return Refusal(400, "the zstd body is cut short")
