"""Signatures: who signed, what was changed since, and what a device's copy may lack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bundles import toy_bundle
from louver.bundle import CLOUD, EDGE, file_hash, write_manifest
from louver.cli import main
from louver.cloud import Repository
from louver.edge import Edge, Settings
from louver.errors import BundleError, ConfigError
from louver.signing import SIGNATURE, sign_bundle, verify_bundle


def key_pair(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    cipher = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher),
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    made = toy_bundle(folder)
    (folder / "CARD.md").write_text("what it does")
    kept = {"CARD.md": file_hash(folder / "CARD.md")}
    write_manifest(folder, made.name, made.serving, {"findings": [], "kept": kept})
    return folder


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_signed_bundle_is_known_by_its_makers_key_alone(tmp_path: Path, bundle: Path) -> None:
    private, public = key_pair(tmp_path, "maker")
    _, other = key_pair(tmp_path, "other")
    with pytest.raises(BundleError, match="louver sign"):
        verify_bundle(bundle, key=public)
    assert sign_bundle(bundle, key=private) == bundle / SIGNATURE
    assert verify_bundle(bundle, key=public).name == "toy"
    with pytest.raises(BundleError, match="does not vouch"):
        verify_bundle(bundle, key=other)
    (bundle / CLOUD).unlink()
    assert verify_bundle(bundle, key=public).id, "a device needs no cloud half"


@pytest.mark.parametrize("file", [EDGE, CLOUD, "CARD.md", "manifest.json", SIGNATURE])
def test_a_changed_byte_is_refused(tmp_path: Path, bundle: Path, file: str) -> None:
    private, public = key_pair(tmp_path, "maker")
    sign_bundle(bundle, key=private)
    changed(bundle / file)
    with pytest.raises(BundleError):
        verify_bundle(bundle, key=public)


def test_findings_made_up_after_signing_are_refused(tmp_path: Path, bundle: Path) -> None:
    private, public = key_pair(tmp_path, "maker")
    sign_bundle(bundle, key=private)
    content = json.loads((bundle / "manifest.json").read_text())
    content["record"]["findings"] = [{"attack": "decoder", "mean": 0.0}]
    (bundle / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="does not vouch"):
        verify_bundle(bundle, key=public)


def test_refusals_say_what_to_do(tmp_path: Path, bundle: Path) -> None:
    private, public = key_pair(tmp_path, "maker", password=b"open")
    with pytest.raises(ConfigError, match="cannot sign with"):
        sign_bundle(bundle, key=private, password="shut")
    with pytest.raises(ConfigError, match="cannot sign with"):
        sign_bundle(bundle, key=public)
    with pytest.raises(ConfigError, match="got no file"):
        sign_bundle(bundle, key=tmp_path / "none.pem")
    assert not list(bundle.glob(".manifest*"))
    assert not (bundle / SIGNATURE).exists()
    sign_bundle(bundle, key=private, password="open")
    with pytest.raises(ConfigError, match="either a public key, or an identity"):
        verify_bundle(bundle)
    with pytest.raises(ConfigError, match="either a public key, or an identity"):
        verify_bundle(bundle, identity="someone")
    with pytest.raises(ConfigError, match="no public key"):
        verify_bundle(bundle, key=bundle / "CARD.md")


def test_the_commands(tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    private, public = key_pair(tmp_path, "maker", password=b"open")
    (tmp_path / "password").write_text("open\n")
    for words, code in (
        (["sign", bundle, "--key", private, "--password-file", tmp_path / "password"], 0),
        (["verify", bundle, "--key", public], 0),
        (["verify", bundle], 2),
    ):
        monkeypatch.setattr("sys.argv", ["louver", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code, words
    said = capsys.readouterr()
    assert "signed, and unchanged" in said.out
    assert "either a public key" in said.err


def test_device_and_server_take_only_what_the_maker_signed(tmp_path: Path, bundle: Path) -> None:
    private, public = key_pair(tmp_path, "maker")
    address = "http://127.0.0.1:9"
    with pytest.raises(BundleError, match="louver sign"):
        Edge(bundle, server=address, settings=Settings(maker_key=public))
    with pytest.raises(BundleError, match="louver sign"):
        Repository([bundle], maker_key=public)
    sign_bundle(bundle, key=private)
    Edge(bundle, server=address, settings=Settings(maker_key=public)).close()
    repository = Repository([bundle], maker_key=public)
    served = [one.model.version for one in repository.current]
    toy_bundle(bundle, seed=5)  # whole, and signed by nobody
    failures = repository.reload()
    assert "does not vouch" in failures[0]
    assert [one.model.version for one in repository.current] == served
    repository.close()
