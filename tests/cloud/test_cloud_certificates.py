"""Certificates that are renewed while the server runs."""

from __future__ import annotations

import http.client
import ipaddress
import signal
import socket
import ssl
import time
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bundles import toy_bundle
from certificates import Authority
from louver.cloud.certificates import Certificates
from louver.errors import ConfigError
from servers import PATIENCE_S, Running, running

pytestmark = pytest.mark.timeout(120)
HERE = (x509.IPAddress(ipaddress.ip_address("127.0.0.1")),)
_LIVE = "/inference.GRPCInferenceService/ServerLive"


def eventually(what, *, within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def put(files: tuple[Path, Path], source: tuple[Path, Path]) -> None:
    """As a renewal does: each file is replaced, one after the other."""
    for path, new in zip(files, source, strict=True):
        beside = path.with_suffix(".new")
        beside.write_bytes(new.read_bytes())
        beside.replace(path)


def shown(address: str) -> int:
    """The serial number of the certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    host, _, port = address.rpartition("//")[2].rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=PATIENCE_S) as plain,
        context.wrap_socket(plain) as connection,
    ):
        content = connection.getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(content).serial_number


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority", "ours")


@pytest.fixture
def files(tmp_path):
    return tmp_path / "live.crt", tmp_path / "live.key"


def options(files: tuple[Path, Path], *more: str) -> tuple[str, ...]:
    return ("--tls-cert", str(files[0]), "--tls-key", str(files[1]), "--drain-s", "0", *more)


def both_show(server: Running, number: int) -> bool:
    return shown(server.told["rest"]) == shown(server.told["grpc"]) == number


def test_a_renewed_certificate_is_shown_and_open_connections_go_on(tmp_path, authority, files):
    toy_bundle(tmp_path / "toy")
    old, new, newest = (authority.issue(name, names=HERE) for name in ("old", "new", "newest"))
    put(files, old)
    trusting = ssl.create_default_context(cafile=authority.ca)
    with running(tmp_path / "log", tmp_path / "toy", options=options(files)) as server:
        assert both_show(server, serial(old[0]))
        connection = http.client.HTTPSConnection(server.host, server.port, timeout=PATIENCE_S, context=trusting)
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().read()
        ours = connection.sock
        channel = grpc.secure_channel(server.told["grpc"], grpc.ssl_channel_credentials(authority.ca.read_bytes()))
        states: list[grpc.ChannelConnectivity] = []
        channel.subscribe(states.append)
        assert channel.unary_unary(_LIVE)(b"", timeout=PATIENCE_S)
        put(files, new)
        eventually(lambda: both_show(server, serial(new[0])))
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().status == 200
        assert connection.sock is ours
        assert channel.unary_unary(_LIVE)(b"", timeout=PATIENCE_S)
        assert states.count(grpc.ChannelConnectivity.READY) == 1  # never anew
        # And on the signal, with no wait for a look at the files.
        put(files, newest)
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: both_show(server, serial(newest[0])))
        assert server.ask("/v2/health/live", tls=trusting).status == 200
        connection.close()
        channel.close()
    assert server.process.returncode == 0


def test_broken_files_are_refused_and_the_old_ones_stay(tmp_path, authority, files):
    toy_bundle(tmp_path / "toy")
    old, new = authority.issue("old", names=HERE), authority.issue("new", names=HERE)
    locked = authority.issue("locked", names=HERE, password=b"secret")
    put(files, old)
    refused = "certificate not read: the one before goes on"
    with running(tmp_path / "log", tmp_path / "toy", options=options(files)) as server:
        for i, breaks in enumerate(
            (
                lambda: files[0].write_bytes(b"no certificate"),
                lambda: files[0].unlink(),
                lambda: put(files, (new[0], old[1])),
                lambda: put(files, locked),
            ),
            1,
        ):
            breaks()
            eventually(lambda count=i: len(server.lines(refused)) >= count)
            assert both_show(server, serial(old[0]))
        put(files, new)
        eventually(lambda: both_show(server, serial(new[0])))
        assert server.lines("certificate read")
        assert "PRIVATE" not in server.log.read_text()
        assert "secret" not in server.log.read_text()


def test_another_authority_of_clients_replaces_the_one_before(tmp_path, authority, files):
    toy_bundle(tmp_path / "toy")
    put(files, authority.issue("server", names=HERE))
    before, after = Authority(tmp_path / "before", "before"), Authority(tmp_path / "after", "after")
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(before.ca.read_bytes())

    def is_let_in(client: tuple[Path, Path]) -> tuple[bool, bool]:
        context = ssl.create_default_context(cafile=authority.ca)
        context.load_cert_chain(*client)
        try:
            rest = server.ask("/v2/health/live", tls=context).status == 200
        except (ssl.SSLError, ConnectionError, http.client.HTTPException):
            rest = False
        credentials = grpc.ssl_channel_credentials(
            authority.ca.read_bytes(), client[1].read_bytes(), client[0].read_bytes()
        )
        with grpc.secure_channel(server.told["grpc"], credentials) as channel:
            try:
                return rest, bool(channel.unary_unary(_LIVE)(b"", timeout=PATIENCE_S))
            except grpc.RpcError:
                return rest, False

    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    old, new = before.issue("device", usage=usage), after.issue("device", usage=usage)
    more = ("--client-ca", str(client_ca))
    with running(tmp_path / "log", tmp_path / "toy", options=options(files, *more)) as server:
        assert (is_let_in(old), is_let_in(new)) == ((True, True), (False, False))
        client_ca.write_bytes(after.ca.read_bytes())
        # Not by `lines`: the library of gRPC writes some of its own about handshakes that fail.
        eventually(lambda: '"certificate read"' in server.log.read_text())
        assert (is_let_in(old), is_let_in(new)) == ((False, False), (True, True))


def test_an_unchanged_file_is_not_read(authority, files, monkeypatch):
    put(files, authority.issue("server", names=HERE))
    found = Certificates(*files)
    monkeypatch.setattr(found, "_load", lambda: pytest.fail("read"))
    found.refresh()


@pytest.mark.parametrize("wrong", ["none", "no PEM", "another key", "a password"])
def test_what_cannot_be_used_stops_the_start(authority, files, wrong):
    put(files, authority.issue("server", names=HERE, password=b"secret" if wrong == "a password" else None))
    if wrong == "none":
        files[1].unlink()
    elif wrong == "no PEM":
        files[0].write_bytes(b"hello")
    elif wrong == "another key":
        files[1].write_bytes(authority.issue("other", names=HERE)[1].read_bytes())
    with pytest.raises(ConfigError, match="PEM"):
        Certificates(*files)
