"""Where the cloud is and how it is trusted: the address, the token, the certificates."""

from __future__ import annotations

import ipaddress
import logging
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from urllib.parse import urlsplit

from louver.edge.settings import Settings
from louver.errors import ConfigError

__all__ = ["Address", "Credential", "Token", "address_of", "tls_context"]

_log = logging.getLogger("louver.edge")

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,4096}=*")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


class Token:
    """A bearer token that no message, log or repr shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        if not _TOKEN.fullmatch(text):
            raise ConfigError(
                f"token: expected letters, digits and -._~+/ up to 4096 of them, got something else of {len(text)} "
                "characters (not shown); look for spaces and line ends"
            )
        self._text = text

    def __repr__(self) -> str:
        return "Token(…)"

    def header(self) -> str:
        """The value of the Authorization header."""
        return f"Bearer {self._text}"

    def hidden_in(self, text: str) -> str:
        """`text` without the token, should somebody have said it back."""
        return text.replace(self._text, "…")


class Credential:
    """The token that is sent, and where another comes from once the server knows it no longer."""

    def __init__(self, source: str | Callable[[], str] | None) -> None:
        self._read = source if callable(source) else None
        text = source() if callable(source) else source
        self.token = None if text is None else Token(text)
        self._guard = Lock()

    def other_than(self, refused: Token | None) -> Token | None:
        """Another token than the one that was refused, if there is one by now."""
        with self._guard:
            if self.token is not refused:
                return self.token
            if refused is None or self._read is None:
                return None
            try:
                found = Token(self._read())
            except ConfigError as error:
                _log.warning("the token was refused, and no other can be read: %s", error)
                return None
            if found.header() == refused.header():
                return None
            self.token = found
            return found


@dataclass(frozen=True, kw_only=True)
class Address:
    """A server's address in parts; `path` is what stands before /v2."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def address_of(server: str, settings: Settings, *, has_token: bool) -> Address:
    """The checked address of `server`.

    Raises:
        ConfigError: no http(s) address, one that holds a secret, or plain HTTP to another machine.
    """
    example = "expected an address such as https://cloud.example:8443"
    if any(sign in server for sign in "@?#"):  # before anything is said of it: it may hold a password
        raise ConfigError(f"server: {example} without user, password or query (not shown); give a token by itself")
    try:
        parts = urlsplit(server)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"server: {example}, got {server!r} ({error}); mend it") from error
    path = parts.path.rstrip("/")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"server: {example}, got {server!r}; mend it")
    if not _PATH.fullmatch(path):
        raise ConfigError(f"server: expected a path of letters, digits, '.', '_', '~' and '-', got {path!r}")
    default = 443 if parts.scheme == "https" else 80
    address = Address(scheme=parts.scheme, host=parts.hostname, port=port or default, path=path)
    if address.scheme == "http" and not address.is_loopback and not settings.allow_plain_http:
        what = "the token and the features" if has_token else "the features"
        raise ConfigError(
            f"server: {address} is plain HTTP to another machine, where everyone on the way could read {what}; use "
            "https://, or allow it by name with allow_plain_http"
        )
    if address.scheme == "http" and (settings.ca or settings.cert):
        raise ConfigError(f"server: expected https:// where certificates are given, got {address}; change one of them")
    return address


def tls_context(settings: Settings) -> ssl.SSLContext:
    """What decides whether the server is the one that it claims to be; verification is always on.

    Raises:
        ConfigError: a certificate or key that cannot be read.
    """
    for what, path in (("ca", settings.ca), ("cert", settings.cert), ("key", settings.key)):
        if path is not None and not path.is_file():
            raise ConfigError(f"{what}: expected a file in PEM format, got {path}, which is none; name another")
    try:
        context = ssl.create_default_context(cafile=settings.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.cert is not None:
            # Without a password function OpenSSL would ask for one on the terminal, and a device would hang.
            context.load_cert_chain(settings.cert, settings.key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"ca, cert, key: expected files in PEM format, the key without a password, got what cannot be read "
            f"({error}); look at {', '.join(str(p) for p in (settings.ca, settings.cert, settings.key) if p)}"
        ) from error
    return context
