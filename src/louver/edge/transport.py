"""Requests to the cloud and answers back: one pool of connections, tries within a deadline, and the breaker.

Inference changes nothing on the server, so a request may be sent again; its id stays the same. What is sent again is
only what may end otherwise: no connection, a timeout, 408, 429, 502, 503 and 504. Everything else is an error at once.
"""

from __future__ import annotations

import math
import random
import ssl
import threading
import time
from collections.abc import Iterator
from typing import cast

import numpy as np
import urllib3
from numpy.typing import NDArray
from urllib3.exceptions import HTTPError, SSLError

from louver.bundle import Bundle
from louver.edge.address import Credential, Token, address_of, tls_context
from louver.edge.breaker import Breaker
from louver.edge.connections import pool_of, set_deadline
from louver.edge.settings import Settings
from louver.edge.wire import HEADER_LENGTH, MOST_ANSWER_HEADER, Request, read_reason, read_scores
from louver.errors import AnswerError, CloudAwayError, CloudError, CloudRefusedError
from louver.triton import triton_name

__all__ = ["Transport"]

_PIECE = 2**16
_BUSY = frozenset({408, 429, 502, 503, 504})
_HINTS = {
    400: "the bundles may differ, or the server is another program",
    401: "give the token that the server knows",
    403: "this client's query budget is spent, or it may not ask: ask who runs the server",
    404: "serve this bundle there, or give the device the bundle that is served",
    413: "send fewer images at once, or raise the server's limit",
    415: "choose another compression",
}


class _BusyError(CloudAwayError):
    """The server or what is before it has no time now; it may say when to come again."""

    def __init__(self, message: str, *, is_alive: bool, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.is_alive, self.retry_after_s = is_alive, retry_after_s


class _UnknownTokenError(CloudRefusedError):
    """The server does not know the token; by now there may be another."""


class Transport:
    """What sends requests for `bundle` to `server`, from any thread."""

    def __init__(self, bundle: Bundle, server: str, credential: Credential, settings: Settings) -> None:
        self.address = address_of(server, settings, has_token=credential.token is not None)
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_pause_s)
        self._bundle, self._credential, self._settings = bundle, credential, settings
        model = triton_name(bundle) if settings.is_triton else f"{bundle.name}/versions/{bundle.id}"
        self._path = f"{self.address.path}/v2/models/{model}/infer"
        self._closed = threading.Event()
        context = tls_context(settings) if self.address.scheme == "https" else None
        self._pool = pool_of(self.address.host, self.address.port, settings.most_in_flight, context)

    def close(self) -> None:
        """Ends waits between tries and drops the connections."""
        self._closed.set()
        self._pool.close()

    def ask(self, request: Request) -> tuple[NDArray[np.float32], int]:
        """The scores for `request`, and how many tries they took.

        Raises:
            CloudAwayError: no answer within the tries and the deadline, or the breaker holds requests back.
            CloudRefusedError: the server says no, or is not to be trusted.
            AnswerError: what it sent is no answer.
        """
        deadline = time.monotonic() + self._settings.deadline_s
        for n_try in range(1, self._settings.tries + 1):
            try:
                return self._try(request, deadline), n_try
            except CloudAwayError as error:
                wait = self._pause(n_try, error)
                if n_try == self._settings.tries or time.monotonic() + wait >= deadline:
                    raise CloudAwayError(f"{error} ({n_try} of {self._settings.tries} tries)") from error
                if self.breaker.ready_in_s > wait:
                    raise
                if self._closed.wait(wait):
                    raise CloudAwayError("the edge was closed while it waited to send again") from error
        raise AssertionError("unreachable")

    def _pause(self, n_try: int, error: CloudAwayError) -> float:
        """Seconds to wait before the next try: full jitter, or what the server asked for."""
        settings = self._settings
        asked = error.retry_after_s if isinstance(error, _BusyError) else None
        if asked is not None:
            return min(asked, settings.most_retry_after_s)
        return random.uniform(0, min(settings.most_backoff_s, settings.backoff_s * 2 ** (n_try - 1)))

    def _try(self, request: Request, deadline: float) -> NDArray[np.float32]:
        token = self._credential.token
        try:
            return self._try_with(token, request, deadline)
        except _UnknownTokenError:
            other = self._credential.other_than(token)
            if other is None:
                raise
        return self._try_with(other, request, deadline)

    def _try_with(self, token: Token | None, request: Request, deadline: float) -> NDArray[np.float32]:
        with self.breaker.attempt() as attempt:
            try:
                scores = self._exchange(token, request, deadline)
            except CloudError as error:
                # A server that refuses, or says when to come again, is alive.
                if isinstance(error, CloudRefusedError) or (isinstance(error, _BusyError) and error.is_alive):
                    attempt.worked()
                else:
                    attempt.failed()
                raise
            attempt.worked()
            return scores

    def _exchange(self, token: Token | None, request: Request, deadline: float) -> NDArray[np.float32]:
        settings = self._settings
        left = max(deadline - time.monotonic(), 0.001)
        timeout = urllib3.Timeout(
            connect=min(settings.connect_timeout_s, left), read=min(settings.read_timeout_s, left)
        )
        set_deadline(deadline)
        try:
            response = self._pool.urlopen(
                "POST",
                self._path,
                body=cast("Iterator[bytes]", _pieces(request.body, deadline)),  # any buffer will do
                headers=_headers(token, request),
                retries=False,
                redirect=False,
                timeout=timeout,
                preload_content=False,
                decode_content=False,
            )
            try:
                most = MOST_ANSWER_HEADER + 4 * request.n_images * math.prod(self._bundle.serving.output_shape)
                content = _bounded(response, most)
            finally:
                # What was not read to its end must not be read by the next request on the same connection.
                if not response.closed:
                    response.close()
                response.release_conn()
        except SSLError as error:
            raise self._tls_error(error) from error
        except (HTTPError, OSError) as error:
            raise CloudAwayError(
                f"no answer from {self.address}: {type(error).__name__}{_cause(error)}; look at the network and the "
                "server"
            ) from error
        if response.status != 200:
            raise self._refusal(response, _without(token, read_reason(content)))
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise AnswerError(
                "the cloud's answer cannot be used: expected none but the identity encoding, which was asked for; "
                "look at the server and what is between"
            )
        try:
            return read_scores(content, response.headers.get(HEADER_LENGTH), request, self._bundle)
        except AnswerError as error:
            raise AnswerError(_without(token, str(error))) from None  # whose cause would show it

    def _refusal(self, response: urllib3.BaseHTTPResponse, reason: str) -> CloudError:
        status = response.status
        if status in _BUSY:
            retry_after_s = _retry_after(response.headers.get("Retry-After"))
            return _BusyError(
                f"{self.address} is busy or away (HTTP {status}: {reason}); send less, or wait",
                is_alive=status in (408, 429) or retry_after_s is not None,
                retry_after_s=retry_after_s,
            )
        if status in _HINTS or 400 <= status < 500:
            model = f"{self._bundle.name} version {self._bundle.id}"
            kind = _UnknownTokenError if status == 401 else CloudRefusedError
            return kind(
                f"{self.address} refuses a request for {model} (HTTP {status}: {reason}); "
                f"{_HINTS.get(status, 'look at the server and what is between')}"
            )
        return AnswerError(f"expected scores from {self.address}, got HTTP {status}: {reason}; look at the server")

    def _tls_error(self, error: SSLError) -> CloudError:
        inner = error.args[0] if error.args else None
        if isinstance(inner, ssl.SSLCertVerificationError):
            return CloudRefusedError(
                f"{self.address} is not trusted ({inner.verify_message}); nothing was sent; look at its certificate, "
                "or name its authority with ca"
            )
        if isinstance(inner, ssl.SSLError) and "ALERT" in (inner.reason or ""):
            return CloudRefusedError(
                f"{self.address} refuses this device's certificate ({inner.reason}); give one that it knows with cert "
                "and key"
            )
        return CloudAwayError(f"no answer from {self.address}: TLS broke ({_cause(error).strip()}); look at the server")


def _headers(token: Token | None, request: Request) -> dict[str, str]:
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(len(request.body)),
        HEADER_LENGTH: str(request.header_length),
        "Accept-Encoding": "identity",
        "User-Agent": "louver",
    }
    if request.compression != "none":
        headers["Content-Encoding"] = request.compression
    if token is not None:
        headers["Authorization"] = token.header()
    return headers


def _without(token: Token | None, text: str) -> str:
    """What a server said, should it have said the token back."""
    return text if token is None else token.hidden_in(text)


def _pieces(body: bytes, deadline: float) -> Iterator[memoryview]:
    """The body piece by piece: a socket's timeout is for one piece, and a slow reader meets the deadline."""
    view = memoryview(body)
    for start in range(0, len(body), _PIECE):
        if time.monotonic() > deadline:
            raise TimeoutError("the deadline passed while sending")
        yield view[start : start + _PIECE]


def _bounded(response: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """The whole content of an answer, of which no more than `most` bytes are ever held."""
    pieces, size = [], 0
    while piece := response.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise AnswerError(
                f"the cloud's answer cannot be used: expected at most {most} bytes, got more; look at the server and "
                "what is between"
            )
    return b"".join(pieces)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait, from either form of the header; None for none or nonsense."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    from email.utils import parsedate_to_datetime

    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _cause(error: BaseException) -> str:
    """What the system said, in brackets, without the objects that libraries put into their messages."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return f" ({error})" if str(error) else ""
