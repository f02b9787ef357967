"""Who the server is, and who the device is: certificates of an authority made for the test."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bundles import IMAGE
from certificates import Authority
from clouds import Cloud
from louver.bundle import Bundle
from louver.edge import Edge, Settings
from louver.errors import CloudAwayError, CloudError, CloudRefusedError, ConfigError

IMAGES = np.full((1, *IMAGE), 0.5, np.float32)
QUICK = {"backoff_s": 0.01, "connect_timeout_s": 2.0, "read_timeout_s": 2.0}


HERE = (x509.IPAddress(ipaddress.ip_address("127.0.0.1")),)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki", "authority")


def served(bundle: Bundle, certificate: tuple[Path, Path], *, clients: Path | None = None) -> Cloud:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients)
    return Cloud(bundle, tls=context)


def test_a_server_of_the_named_authority_is_trusted(bundle: Bundle, authority: Authority) -> None:
    with (
        served(bundle, authority.issue("server", names=HERE)) as cloud,
        Edge(bundle, server=cloud.address, token="hush", settings=Settings(ca=authority.ca, **QUICK)) as edge,
    ):
        assert edge.infer(IMAGES).tries == 1
        assert edge.infer(IMAGES).tries == 1
        assert cloud.n_connections == 1


@pytest.mark.parametrize("policy", ["fail", "local", "queue"])
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("expired", "certificate has expired"),
        ("not yet", "certificate is not yet valid"),
        ("wrong host", "IP address mismatch"),
        ("unknown authority", "unable to get local issuer certificate|self-signed certificate"),
        ("no authority named", "unable to get local issuer certificate|self-signed certificate"),
        ("a device's certificate", "unsuitable certificate purpose|unsupported certificate purpose"),
    ],
)
def test_a_server_that_is_not_to_be_trusted_is_sent_nothing(
    tmp_path: Path, bundle: Bundle, authority: Authority, trouble: str, words: str, policy: str
) -> None:
    options: dict = {"names": HERE}
    ca: Path | None = authority.ca
    if trouble == "expired":
        options["days"] = (-30, -1)
    elif trouble == "not yet":
        options["days"] = (1, 30)
    elif trouble == "wrong host":
        options["names"] = (x509.DNSName("cloud.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.2")))
    elif trouble == "unknown authority":
        ca = Authority(tmp_path / "other", "authority").ca
    elif trouble == "no authority named":
        ca = None
    else:
        options["usage"] = ExtendedKeyUsageOID.CLIENT_AUTH
    settings = Settings(ca=ca, queue_folder=tmp_path / "queue" if policy == "queue" else None, **QUICK)
    with (
        served(bundle, authority.issue("server", **options)) as cloud,
        Edge(bundle, server=cloud.address, token="hush", policy=policy, settings=settings) as edge,
    ):
        with pytest.raises(CloudRefusedError, match=rf"not trusted \(.*({words}).*nothing was sent"):
            edge.infer(IMAGES)
        assert cloud.seen == []
        assert cloud.n_connections == 1  # not tried again
        assert edge.n_waiting == 0


def test_a_device_shows_its_certificate_where_it_is_asked_for(
    tmp_path: Path, bundle: Bundle, authority: Authority
) -> None:
    cert, key = authority.issue("device", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    strange = Authority(tmp_path / "other", "other").issue("stranger", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    with served(bundle, authority.issue("server", names=HERE), clients=authority.ca) as cloud:
        with Edge(bundle, server=cloud.address, settings=Settings(ca=authority.ca, cert=cert, key=key)) as edge:
            assert edge.infer(IMAGES).source == "cloud"
        for options in ({}, {"cert": strange[0], "key": strange[1]}):
            settings = Settings(ca=authority.ca, tries=2, **QUICK, **options)
            with Edge(bundle, server=cloud.address, settings=settings) as edge, pytest.raises(CloudError) as caught:
                edge.infer(IMAGES)
            # TLS 1.3 tells the client only after the handshake, and a reset may overtake what it tells.
            assert isinstance(caught.value, CloudAwayError) or "refuses this device's certificate" in str(caught.value)
        assert len(cloud.seen) == 1


def test_what_is_no_certificate_is_refused_by_name(tmp_path: Path, bundle: Bundle, authority: Authority) -> None:
    cert, key = authority.issue("device")
    locked = authority.issue("locked", password=b"sesame")
    _, other = authority.issue("other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for options, words in (
        ({"ca": garbage}, "files in PEM format"),
        ({"ca": tmp_path / "nowhere.pem"}, r"ca: expected a file in PEM format, got .*nowhere\.pem"),
        ({"cert": garbage, "key": key}, "files in PEM format"),
        ({"cert": cert, "key": other}, "files in PEM format"),
        ({"cert": locked[0], "key": locked[1]}, "the key without a password"),
    ):
        with pytest.raises(ConfigError, match=words):
            Edge(bundle, server="https://127.0.0.1:1", settings=Settings(**options))
    with pytest.raises(ConfigError, match="expected https:// where certificates are given"):
        Edge(bundle, server="http://127.0.0.1:1", settings=Settings(ca=authority.ca))


def test_plain_http_on_a_tls_port_and_the_other_way_is_no_answer(bundle: Bundle, authority: Authority) -> None:
    with served(bundle, authority.issue("server", names=HERE)) as cloud:
        plain = cloud.address.replace("https", "http")
        with Edge(bundle, server=plain, settings=Settings(tries=1, **QUICK)) as edge, pytest.raises(CloudAwayError):
            edge.infer(IMAGES)
    with Cloud(bundle) as cloud:
        secure = cloud.address.replace("http", "https")
        settings = Settings(ca=authority.ca, tries=1, **QUICK)
        with Edge(bundle, server=secure, settings=settings) as edge, pytest.raises(CloudAwayError, match="TLS broke"):
            edge.infer(IMAGES)
        assert cloud.seen == []


def test_an_old_protocol_is_not_spoken(bundle: Bundle, authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("server", names=HERE))
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")
    settings = Settings(ca=authority.ca, tries=1, **QUICK)
    with (
        Cloud(bundle, tls=context) as cloud,
        Edge(bundle, server=cloud.address, settings=settings) as edge,
    ):
        with pytest.raises(CloudError):
            edge.infer(IMAGES)
        assert cloud.seen == []


def test_the_address_of_a_listener_without_a_voice_times_out(bundle: Bundle, authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        settings = Settings(ca=authority.ca, tries=1, connect_timeout_s=0.2)
        address = f"https://127.0.0.1:{mute.getsockname()[1]}"
        with Edge(bundle, server=address, settings=settings) as edge, pytest.raises(CloudAwayError):
            edge.infer(IMAGES)
