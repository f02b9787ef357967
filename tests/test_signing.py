"""Signatures: who signed, what was changed since, and what a device's copy may lack."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from model_signing import signing, verifying
from requests import HTTPError
from sigstore._internal.fulcio.client import FulcioClientError
from sigstore._internal.rekor import RekorClientError
from sigstore.errors import VerificationError
from sigstore.oidc import IdentityError

import louver.signing
from bundles import toy_bundle
from certificates import key_pair
from louver.bundle import CLOUD, EDGE, file_hash, read_bundle, write_manifest
from louver.cli import main
from louver.cloud import Repository
from louver.cloud import Settings as CloudSettings
from louver.cloud.keeper import Keeper
from louver.cloud.models import load_model
from louver.edge import Edge, Settings
from louver.errors import BundleError, ConfigError, StorageError
from louver.signing import SIGNATURE, Maker, sign_bundle, verify_bundle


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
        verify_bundle(bundle, Maker(key=public))
    assert sign_bundle(bundle, key=private) == bundle / SIGNATURE
    assert verify_bundle(bundle, Maker(key=public)).name == "toy"
    with pytest.raises(BundleError, match="does not vouch"):
        verify_bundle(bundle, Maker(key=other))
    (bundle / CLOUD).unlink()
    assert verify_bundle(bundle, Maker(key=public)).id, "a device needs no cloud half"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_who_may_read_the_bundle_may_read_its_signature(tmp_path: Path, bundle: Path, umask: int, mode: int) -> None:
    private, _ = key_pair(tmp_path, "maker")
    before = os.umask(umask)
    try:
        path = sign_bundle(bundle, key=private)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("file", [EDGE, CLOUD, "CARD.md", "manifest.json", SIGNATURE])
def test_a_changed_byte_is_refused(tmp_path: Path, bundle: Path, file: str) -> None:
    private, public = key_pair(tmp_path, "maker")
    sign_bundle(bundle, key=private)
    changed(bundle / file)
    with pytest.raises(BundleError):
        verify_bundle(bundle, Maker(key=public))


def by_link(folder: Path, other: Path) -> None:
    beside = folder.with_name("beside")
    beside.symlink_to(other)
    beside.replace(folder)


def by_name(folder: Path, other: Path) -> None:
    folder.resolve().rename(folder.with_name("away"))
    other.rename(folder.resolve())


def loaded(folder: Path, maker: Maker) -> str:
    return load_model(folder, threads=1, maker=maker).version


def opened(folder: Path, maker: Maker) -> str:
    with Edge(folder, server="http://127.0.0.1:9", settings=Settings(maker_key=maker.key)) as edge:
        return edge.bundle.id


def handed_out(folder: Path, maker: Maker) -> str:
    _, (one,) = asyncio.run(Keeper([folder], CloudSettings(), keep_s=0, maker=maker).contents())
    content = json.loads(one.manifest)
    assert (content["id"], content["serving"]["files"][CLOUD]) == (one.version, hashlib.sha256(one.cloud).hexdigest())
    return one.version


@pytest.mark.parametrize("swap", [by_link, by_name])
@pytest.mark.parametrize("moment", ["before the signature", "after it", "before the graphs"])
@pytest.mark.parametrize("read", [loaded, opened, handed_out])
def test_what_was_verified_is_what_is_used_whatever_takes_its_place(
    tmp_path: Path,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path, Maker], str],
    moment: str,
    swap: Callable[[Path, Path], None],
) -> None:
    private, public = key_pair(tmp_path, "maker")
    sign_bundle(bundle, key=private)
    link, unsigned = tmp_path / "link", tmp_path / "unsigned"
    link.symlink_to(bundle)
    toy_bundle(unsigned, seed=9)
    signed = read_bundle(bundle).id
    swaps = []

    def swapped() -> None:
        if not swaps:
            swaps.append(swap(link, unsigned))

    def hook(owner: object, name: str, *, is_after: bool = False) -> None:
        whole = getattr(owner, name)

        def hooked(*arguments: object, **named: object) -> object:
            if not is_after:
                swapped()
            found = whole(*arguments, **named)
            if is_after:
                swapped()
            return found

        monkeypatch.setattr(owner, name, hooked)

    if moment == "before the signature":
        hook(louver.signing, "bytes_of")
    elif moment == "after it":
        hook(verifying.Config, "verify", is_after=True)
    else:
        hook(louver.signing, "check_kept", is_after=True)
    try:
        assert read(link, Maker(key=public)) == signed
    except BundleError:
        assert swap is by_name, "where a link is moved, what it led to is there still"
    assert swaps


def test_what_was_found_whole_is_what_is_signed(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key_pair(tmp_path, "maker")
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(bundle)
    toy_bundle(other, seed=9)
    sign = signing.Config.sign

    def swapped(config: signing.Config, *arguments: Path) -> None:
        by_link(link, other)
        sign(config, *arguments)

    monkeypatch.setattr(signing.Config, "sign", swapped)
    assert sign_bundle(link, key=private) == link / SIGNATURE
    assert verify_bundle(bundle, Maker(key=public)).id == read_bundle(bundle).id
    assert not (other / SIGNATURE).exists()


def test_without_a_place_for_a_copy_nothing_is_taken_for_forged(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key_pair(tmp_path, "maker")
    sign_bundle(bundle, key=private)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="TMPDIR"):
        verify_bundle(bundle, Maker(key=public))


def test_findings_made_up_after_signing_are_refused(tmp_path: Path, bundle: Path) -> None:
    private, public = key_pair(tmp_path, "maker")
    sign_bundle(bundle, key=private)
    content = json.loads((bundle / "manifest.json").read_text())
    content["record"]["findings"] = [{"attack": "decoder", "mean": 0.0}]
    (bundle / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="does not vouch"):
        verify_bundle(bundle, Maker(key=public))


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
    with pytest.raises(ConfigError, match="no public key"):
        verify_bundle(bundle, Maker(key=bundle / "CARD.md"))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"identity": "someone"},
        {"issuer": "https://issuer.example"},
        {"identity": "", "issuer": ""},
        {"identity": "", "issuer": "https://issuer.example"},
        {"key": Path("maker.pub"), "identity": "someone", "issuer": "https://issuer.example"},
        {"key": Path("maker.pub"), "identity": "", "issuer": ""},
    ],
)
def test_a_maker_is_a_key_or_an_identity_with_its_issuer(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="either a public key, or an identity"):
        Maker(**wrong)
    if wrong:
        with pytest.raises(ConfigError, match="either a public key, or an identity"):
            Settings(**{f"maker_{name}": value for name, value in wrong.items()})


KEYLESS = {"identity": "maker@example.com", "issuer": "https://issuer.example"}


@pytest.fixture
def sigstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sigstore as if it were reached: who signed stands in the signature, beside the hash of what was signed."""

    def named(config: verifying.Config, *, identity: str, oidc_issuer: str) -> None:
        config.wanted = f"{identity} {oidc_issuer}"

    def verify(config: verifying.Config, manifest: Path, signature: Path) -> None:
        if signature.read_text() != f"{config.wanted} {file_hash(manifest)}":
            raise VerificationError("another identity, or another manifest")

    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", named)
    monkeypatch.setattr(verifying.Config, "verify", verify)


def sign_keyless(bundle: Path, identity: str, issuer: str) -> None:
    (bundle / SIGNATURE).write_text(f"{identity} {issuer} {file_hash(bundle / 'manifest.json')}")


def test_device_and_server_ask_for_the_identity_of_the_maker(bundle: Path, sigstore: None) -> None:
    maker, settings = Maker(**KEYLESS), Settings(**{f"maker_{name}": value for name, value in KEYLESS.items()})
    sign_keyless(bundle, "somebody@example.com", KEYLESS["issuer"])
    for refused in (lambda: Edge(bundle, server="http://127.0.0.1:9", settings=settings), lambda: load(bundle, maker)):
        with pytest.raises(BundleError, match="does not vouch"):
            refused()
    sign_keyless(bundle, **KEYLESS)
    Edge(bundle, server="http://127.0.0.1:9", settings=settings).close()
    assert load(bundle, maker)
    changed(bundle / CLOUD)
    with pytest.raises(BundleError, match="not the file that was exported"):
        load(bundle, maker)


def load(bundle: Path, maker: Maker) -> list[str]:
    repository = Repository([bundle], maker=maker)
    repository.close()
    return [one.model.version for one in repository.current]


def test_the_commands_ask_for_the_identity_of_the_maker(
    bundle: Path, sigstore: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # It would keep this test's standard error for the log of all tests after it.
    monkeypatch.setattr("louver.cli_cloud._log_lines", lambda: None)
    sign_keyless(bundle, "somebody@example.com", KEYLESS["issuer"])
    maker = ("--maker-identity", KEYLESS["identity"], "--maker-issuer", KEYLESS["issuer"])
    to_device = ("run", bundle, "picture.png", "--server", "http://127.0.0.1:9")
    for words, told in (
        ((*to_device, *maker), "does not vouch"),
        (("serve", bundle, *maker), "does not vouch"),
        ((*to_device, *maker, "--maker-key", "maker.pub"), "either a public key"),
        (("serve", bundle, *maker, "--maker-key", "maker.pub"), "either a public key"),
        ((*to_device, *maker[:2]), "either a public key"),
        (("serve", bundle, *maker[2:]), "either a public key"),
    ):
        assert command(monkeypatch, *words) == 2, words
        assert told in capsys.readouterr().err, words


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> object:
    # `serve` sets up the log of its process, which here goes on to other tests.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr("sys.argv", ["louver", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_without_a_network_keyless_signatures_say_what_to_do(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "token").write_text("e30.e30.e30")
    sign_keyless(bundle, **KEYLESS)
    maker = ("--maker-identity", KEYLESS["identity"], "--maker-issuer", KEYLESS["issuer"])
    for words in (
        ("sign", bundle),
        ("sign", bundle, "--token-file", tmp_path / "token"),
        ("verify", bundle, "--identity", KEYLESS["identity"], "--issuer", KEYLESS["issuer"]),
        ("run", bundle, "picture.png", "--server", "http://127.0.0.1:9", *maker),
    ):
        assert command(monkeypatch, *words) == 2, words
        said = capsys.readouterr()
        assert "needs a network on which Sigstore is reached" in said.err
        assert "Traceback" not in said.err
    assert (bundle / SIGNATURE).read_text().startswith(KEYLESS["identity"]), "what was there is there still"


@pytest.mark.parametrize(
    "error",
    [
        FulcioClientError("no such token"),
        RekorClientError(HTTPError("full")),
        IdentityError("too old"),
        EOFError(),
        OSError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_sigstore_refuses_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(signing.Config, "use_sigstore_signer", lambda *_, **__: None)
    monkeypatch.setattr(signing.Config, "sign", refuse)
    with pytest.raises(ConfigError, match=r"cannot sign without a key \(.+\): that needs"):
        sign_bundle(bundle)
    assert not (bundle / SIGNATURE).exists()


def test_the_commands(tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    private, public = key_pair(tmp_path, "maker", password=b"open")
    (tmp_path / "password").write_text("open\n")
    for words, code in (
        (["sign", bundle, "--key", private, "--password-file", tmp_path / "password"], 0),
        (["verify", bundle, "--key", public], 0),
        (["verify", bundle], 2),
    ):
        assert command(monkeypatch, *words) == code, words
    said = capsys.readouterr()
    assert "signed, and unchanged" in said.out
    assert "either a public key" in said.err


@pytest.mark.parametrize("option", ["--password-file", "--token-file"])
def test_a_secret_that_is_no_text_is_refused_and_not_shown(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    private, _ = key_pair(tmp_path, "maker")
    (tmp_path / "secret").write_bytes(b"swordfish\xff")
    assert command(monkeypatch, "sign", bundle, "--key", private, option, tmp_path / "secret") == 2
    said = capsys.readouterr().err
    assert f"{option}: expected text in UTF-8" in said
    assert "swordfish" not in said
    assert not (bundle / SIGNATURE).exists()


def test_device_and_server_take_only_what_the_maker_signed(tmp_path: Path, bundle: Path) -> None:
    private, public = key_pair(tmp_path, "maker")
    address = "http://127.0.0.1:9"
    with pytest.raises(BundleError, match="louver sign"):
        Edge(bundle, server=address, settings=Settings(maker_key=public))
    with pytest.raises(BundleError, match="louver sign"):
        Repository([bundle], maker=Maker(key=public))
    sign_bundle(bundle, key=private)
    Edge(bundle, server=address, settings=Settings(maker_key=public)).close()
    repository = Repository([bundle], maker=Maker(key=public))
    served = [one.model.version for one in repository.current]
    toy_bundle(bundle, seed=5)  # whole, and signed by nobody
    failures = repository.reload()
    assert "does not vouch" in failures[0]
    assert [one.model.version for one in repository.current] == served
    public.unlink()
    assert "got no file" in repository.reload()[0], "without the maker's key nothing new is taken up"
    assert [one.model.version for one in repository.current] == served
    repository.close()
