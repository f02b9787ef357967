"""Bytes to the body of a request: compressed, and filled up so that the length says little of the picture.

A compressed feature is shorter where the picture is plain, so its length leaks. It is therefore filled up to the next
of a few fixed lengths. Powers of two would say least and send up to twice as much; Padmé, with at most 12 %, gets finer
as lengths grow and so says most of just the large features. Here a power of two and the next have a fixed number of
lengths between them (8: at most 12.5 % more, and as little said of a large feature as of a small one).

The filling is part of the format, so that any decoder skips it: with zstd skippable frames (RFC 8878, 3.1.2), with
gzip a comment in the header of the one member (RFC 1952, 2.3), which unlike further members every reader accepts.
"""

from __future__ import annotations

import struct
import threading
import zlib

import zstandard

from louver.edge.settings import Settings

__all__ = ["bucket", "pack"]

_SMALLEST = 512
_SKIPPABLE, _FRAME_HEADER = 0x184D2A50, 8
_MOST_FRAME = 2**32 - 1
_GZIP_HEAD = b"\x1f\x8b\x08%c\0\0\0\0\0\xff"  # deflate, flags, no time, no extra flags, unknown system
_COMMENT, _GZIP_FRAME = 16, 18
_local = threading.local()


def pack(content: bytes, settings: Settings) -> bytes:
    """`content` as it is sent: compressed and filled up as `settings` say."""
    if settings.compression == "none":
        return content
    if settings.compression == "zstd":
        body = _zstd(content, settings.level)
        return body + _skipped(_goal(len(body) + _FRAME_HEADER, content, settings) - len(body))
    return _gzip(content, settings)


def bucket(length: int, per_doubling: int) -> int:
    """The least length of the fixed ones that is `length` or more; at least 512.

    >>> [bucket(length, 8) for length in (3, 513, 640, 70_000)]
    [512, 576, 640, 73728]
    >>> bucket(70_000, 1)
    131072
    """
    if length <= _SMALLEST:
        return _SMALLEST
    step = max(1, (1 << ((length - 1).bit_length() - 1)) // per_doubling)
    return -(-length // step) * step


def _goal(least: int, content: bytes, settings: Settings) -> int:
    """What to fill up to; where the next fixed length is past all that `content` can become, then to that."""
    if not settings.is_padded:
        return 0
    return min(bucket(least, settings.buckets_per_doubling), max(_SMALLEST, _longest(len(content)) + _FRAME_HEADER))


def _longest(raw: int) -> int:
    """More than what zstd or deflate make of `raw` bytes that do not compress."""
    return raw + raw // 256 + 128


def _zstd(content: bytes, level: int) -> bytes:
    # A compressor is some hundred KiB and not to be shared by threads: each keeps its own.
    made: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(level=level)
    return made[level].compress(content)


def _skipped(length: int) -> bytes:
    """Skippable frames of `length` bytes together; none if that is negative."""
    frames = []
    while length > 0:
        size = min(length - _FRAME_HEADER, _MOST_FRAME)
        if 0 < length - _FRAME_HEADER - size < _FRAME_HEADER:
            size -= _FRAME_HEADER  # what is left must hold a header
        frames.append(struct.pack("<II", _SKIPPABLE, size) + bytes(size))
        length -= _FRAME_HEADER + size
    return b"".join(frames)


def _gzip(content: bytes, settings: Settings) -> bytes:
    deflate = zlib.compressobj(settings.level, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = deflate.compress(content) + deflate.flush()
    tail = struct.pack("<II", zlib.crc32(content), len(content) % 2**32)
    plain = _GZIP_FRAME + len(data)
    comment = b""
    if settings.is_padded:
        comment = b" " * (_goal(plain + 1, content, settings) - plain - 1) + b"\0"
    return _GZIP_HEAD % (_COMMENT if comment else 0) + comment + data + tail
