"""Signatures of bundles, in the form of the OpenSSF model signing specification.

What is signed is `manifest.json`: it holds the hash of every other file, so that a device may keep the files that it
needs, and a changed byte in any of them is refused. Signatures are by a key file, or keyless by an identity that
Sigstore knows, which needs a network.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from louver.bundle import MANIFEST, Bundle, bytes_of, check_kept, read_bundle
from louver.errors import BundleError, ConfigError, MissingExtraError
from louver.storage import refusals, write_bytes

__all__ = ["SIGNATURE", "Maker", "sign_bundle", "trusted_bundle", "verify_bundle"]

SIGNATURE = "manifest.json.sig"
_MOST_SIGNATURE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Who must have signed a bundle: who holds the private half of `key`, or `identity` as `issuer` vouches for it.

    Raises:
        ConfigError: neither, both, or an identity without its issuer.
    """

    key: Path | None = None
    identity: str | None = None
    issuer: str | None = None

    def __post_init__(self) -> None:
        is_keyless = self.identity is not None or self.issuer is not None
        # An empty one, as of a variable that is not set, must not pass for none.
        if is_keyless == (self.key is not None) or (is_keyless and not (self.identity and self.issuer)):
            raise ConfigError("expected either a public key, or an identity with its issuer, to verify by; give one")


def sign_bundle(
    folder: Path, *, key: Path | None = None, password: str | None = None, identity_token: str | None = None
) -> Path:
    """The signature of the bundle in `folder`, written beside its manifest: by the private `key`, else keyless.

    Raises:
        BundleError: no whole bundle there.
        ConfigError: a key that cannot be read, or no way to sign without one.
        StorageError: the disk refused.
    """
    bundle = _whole(read_bundle(folder))
    try:
        from model_signing import signing
    except ImportError as error:
        raise _missing() from error
    config = signing.Config()  # type: ignore[no-untyped-call]
    try:
        if key is not None:
            if not key.is_file():
                raise ConfigError(f"expected a private key (PEM) in {key}, got no file")
            # Their annotation says str; what reads the key wants bytes.
            secret: Any = None if password is None else password.encode()
            config.use_elliptic_key_signer(private_key=key, password=secret)
        else:
            config.use_sigstore_signer(identity_token=identity_token, use_ambient_credentials=identity_token is None)
        # Of the bytes that were found whole. Elsewhere, and then written whole: a signature cut short would be taken
        # for a wrong one.
        with tempfile.TemporaryDirectory() as there:
            copy = Path(there) / MANIFEST
            copy.write_bytes(bundle.manifest)
            config.sign(copy, Path(there) / SIGNATURE)
            content = (Path(there) / SIGNATURE).read_bytes()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot sign with {key or 'this identity'}: {error}") from error
    except _keyless_errors() as error:
        if key is not None:
            raise
        raise ConfigError(
            f"cannot sign without a key ({_told(error)}): that needs a network on which Sigstore is reached, and a "
            "token, or a browser, that says who signs; mend that, or give a key by --key"
        ) from error
    write_bytes(bundle.beside(SIGNATURE), content)
    return folder / SIGNATURE


def verify_bundle(folder: Path, maker: Maker) -> Bundle:
    """The bundle in `folder`, if its signature is by `maker`; an identity is looked up at Sigstore, over the network.

    Every file that is there must be the one that was signed. What the bundle says is taken from the very bytes that
    the signature is of, whatever is moved into their place meanwhile.

    Raises:
        BundleError: no signature, one by someone else, or a changed byte; or Sigstore, which knows the identity, is not
            reached.
        ConfigError: a key that cannot be read.
        StorageError: no temporary folder to verify a copy in.
    """
    return _whole(read_bundle(folder, vouch=lambda place, manifest: _vouch(folder, place, manifest, maker)))


def _vouch(folder: Path, place: Path, manifest: bytes, maker: Maker) -> None:
    """Raises unless the signature in `place` is of these bytes, and by the maker."""
    try:
        from model_signing import verifying
    except ImportError as error:
        raise _missing() from error
    signature = bytes_of(place / SIGNATURE, most=_MOST_SIGNATURE_BYTES)
    if signature is None:
        raise BundleError(
            f"expected a signature {SIGNATURE} in {folder}, got none; sign it with `louver sign {folder}`"
        )
    config = verifying.Config()  # type: ignore[no-untyped-call]
    if maker.key is not None:
        if not maker.key.is_file():
            raise ConfigError(f"expected a public key (PEM) in {maker.key}, got no file")
        try:
            config.use_elliptic_key_verifier(public_key=maker.key)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{maker.key} is no public key that this version reads: {error}") from error
    else:
        try:
            config.use_sigstore_verifier(identity=maker.identity or "", oidc_issuer=maker.issuer or "")
        except _keyless_errors() as error:
            raise BundleError(
                f"{folder}: cannot verify a signature by {maker.identity} ({_told(error)}): that needs a network on "
                "which Sigstore is reached; mend that, or have the bundle signed with a key and verify by that"
            ) from error
    # The library reads by path, and reads again: only of copies that are ours is what it verified what we hold.
    then = "free space in the temporary folder, or name another by TMPDIR"
    with refusals("a copy of the manifest", then=then), tempfile.TemporaryDirectory() as there:
        copies = Path(there) / MANIFEST, Path(there) / SIGNATURE
        for copy, content in zip(copies, (manifest, signature), strict=True):
            copy.write_bytes(content)
        try:
            config.verify(*copies)
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise BundleError(
                f"{folder}: the signature does not vouch for this bundle ({reason}); take it from its maker again"
            ) from error


def trusted_bundle(folder: Path, maker: Maker | None) -> Bundle:
    """The bundle in `folder`; where a maker is named, only if its signature is by that one.

    Raises:
        BundleError, ConfigError: as `read_bundle` and `verify_bundle`.
    """
    return read_bundle(folder) if maker is None else verify_bundle(folder, maker)


def _keyless_errors() -> tuple[type[Exception], ...]:
    """What keyless calls raise. Sigstore's own base class leaves out what its services and issuers of tokens refuse.

    `EOFError` is of the code that it asks for where there is no browser, and nobody who could type it.
    """
    from sigstore._internal.fulcio.client import ExpiredCertificate, FulcioClientError
    from sigstore._internal.rekor import RekorClientError
    from sigstore.errors import Error
    from sigstore.oidc import ExpiredIdentity, IssuerError

    of_sigstore = (Error, ExpiredCertificate, ExpiredIdentity, FulcioClientError, IssuerError, RekorClientError)
    return (*of_sigstore, EOFError, OSError, ValueError)


def _told(error: Exception) -> str:
    """One line of what a library says; many of its errors say nothing but their name."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _whole(bundle: Bundle) -> Bundle:
    """The bundle, each of its files that is here checked."""
    for file in bundle.serving.files:
        if bundle.path(file).is_file():
            bundle.content(file)
    check_kept(bundle)
    return bundle


def _missing() -> MissingExtraError:
    return MissingExtraError("signatures need model-signing: pip install 'louver[sign]'")
