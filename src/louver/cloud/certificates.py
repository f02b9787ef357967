"""The server's certificate, taken up anew when its files change: a renewal needs no restart, and ends no connection."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from louver.cloud.clients import file_mark
from louver.errors import ConfigError

__all__ = ["Certificates"]

_log = logging.getLogger("louver.cloud")


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What the files hold at one moment: for REST as a context, for gRPC in PEM."""

    context: ssl.SSLContext
    configuration: Any
    content: tuple[bytes | None, ...]


class Certificates:
    """A certificate, its key, and who signs the certificates of clients if they need one; files in PEM.

    New connections get what the files held when they last were in order. Connections that are open go on.

    Raises:
        ConfigError: a file is not there, or certificate and key do not fit.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._files = (certificate, key, client_ca)
        self._marks = self._marks_now()
        self._read = self._load()
        self._told_grpc = self._read.configuration
        # The one that listens only hands over to the newest. Its own certificate is never shown.
        self.context = _context(*self._files)
        self.context.sni_callback = self._hand_over

    def credentials(self) -> Any:  # noqa: ANN401 - grpc has no types
        """For a port of gRPC, one port only."""
        return grpc.dynamic_ssl_server_credentials(
            self._told_grpc, self._fetch, require_client_authentication=self._files[2] is not None
        )

    def refresh(self, *, is_asked: bool = False) -> None:
        """Takes up files that have changed. Broken ones are refused with a line in the log, and what was goes on.

        is_asked: reads them even if they look unchanged.
        """
        marks = self._marks_now()
        if marks == self._marks and not is_asked:
            return
        self._marks = marks
        try:
            found = self._load()
        except ConfigError as error:
            _log.error("certificate not read: the one before goes on", extra={"reason": str(error)})
            return
        if found.content != self._read.content:
            self._read = found
            _log.info("certificate read", extra={"file": str(self._files[0])})

    def _hand_over(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Called in each handshake, with and without a name."""
        connection.context = self._read.context

    def _fetch(self) -> Any:  # noqa: ANN401 - grpc has no types
        """Called by gRPC in a thread of its own before each handshake; None for no change."""
        found = self._read.configuration
        if found is self._told_grpc:
            return None
        self._told_grpc = found
        return found

    def _load(self) -> _Read:
        before = self._content()
        certificate, key, client_ca = before
        context = _context(*self._files)
        if self._content() != before:
            raise ConfigError(
                f"{self._files[0]}: it, or what belongs to it, changed while it was read; it is read again"
            )
        configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)
        return _Read(context=context, configuration=configuration, content=before)

    def _content(self) -> tuple[bytes | None, ...]:
        return tuple(_bytes_of(path) if path is not None else None for path in self._files)

    def _marks_now(self) -> list[object]:
        return [file_mark(path) for path in self._files if path is not None]


def _context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password OpenSSL would ask for one at the terminal, and the server would wait for it.
        found.load_cert_chain(certificate, key, password=_no_password)
        if client_ca is not None:
            found.load_verify_locations(client_ca)
            found.verify_mode = ssl.CERT_REQUIRED
            # A resumed session would pass over the certificate, whoever signs them by then.
            found.num_tickets = 0
            found.options |= ssl.OP_NO_TICKET
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(f"{certificate}: expected a certificate and its key in PEM, got {_told(error)}") from error
    return found


def _no_password() -> str:
    return ""


def _told(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else (getattr(error, "strerror", None) or str(error))


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a file in PEM") from error
