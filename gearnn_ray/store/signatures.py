"""Signatures of releases: ed25519, with keys in PEM files. No reader asks for one unless it is told to.

    openssl genpkey -algorithm ed25519 -out release.key
    openssl pkey -in release.key -pubout -out release.pub

A signature binds a release's name and the digest of its manifest, which holds the digest of everything else that is pulled. It
does not bind tags: whoever can write refs can point a tag at another signed release of the same name, such as an older one.
"""

import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import hex_of

SIGNATURE_BYTES = 64


def read_private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """The private key in an unencrypted PEM file. Raises UserError for anything else."""
    try:
        key = load_pem_private_key(_pem(path), password=None)
    except TypeError as error:
        raise UserError(f"the key file {path} is encrypted: give a key without a passphrase") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path} holds no private key in PEM: make one with `openssl genpkey -algorithm ed25519`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"the key in {path} is not ed25519: make one with `openssl genpkey -algorithm ed25519`")
    return key


def public_key(key: str) -> str:
    """The 64 hexadecimal digits of a public key, from these digits themselves or from a PEM file. Raises UserError for anything
    else.
    """
    if re.fullmatch("[0-9a-f]{64}", key):
        return key
    try:
        found = load_pem_public_key(_pem(key))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"{key} holds no public key in PEM: make one with `openssl pkey -in release.key -pubout`, or give its 64 hexadecimal "
            "digits"
        ) from error
    if not isinstance(found, Ed25519PublicKey):
        raise UserError(f"the public key in {key} is not ed25519: make one with `openssl genpkey -algorithm ed25519`")
    return found.public_bytes_raw().hex()


def signature_path(digest: str, public: str) -> str:
    """Where the signature of a manifest lies. public: the 64 hexadecimal digits of the key."""
    return f"signatures/{hex_of(digest)}/{public}"


def sign(name: str, digest: str, key: Ed25519PrivateKey) -> tuple[str, bytes]:
    """The public key, as 64 hexadecimal digits, and the signature of a release."""
    return key.public_key().public_bytes_raw().hex(), key.sign(_statement(name, digest))


def check_signature(name: str, digest: str, signature: bytes, public: str) -> None:
    """Raise CorruptStoreError unless this is the signature of the release by this key (64 hexadecimal digits)."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, _statement(name, digest))
    except (InvalidSignature, ValueError) as error:
        raise CorruptStoreError(
            f"The signature of {name}@{digest} by the key {public[:12]}… is not valid. Do not use this release, and ask its "
            "publisher."
        ) from error


def _statement(name: str, digest: str) -> bytes:
    """What is signed. The first line keeps the key's other signatures from being taken for one of a release."""
    return f"gearnn_ray release 1\n{name}\n{digest}\n".encode()


def _pem(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"the key file {path} cannot be read ({error.strerror}): check the path") from error
