"""Simple signatures by GPG keys, checked by gpgv.

Document: containers-signature(5); GnuPG's doc/DETAILS for the lines that gpgv writes about a signature.
"""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from host import processes
from host.concurrency.threads import in_image_thread
from host.errors import KubeletReasonError, PodkeelError
from images.signatures.claims import MAX_CLAIM_BYTES
from images.signatures.keys import contents, unusable
from images.signatures.refusal import SignatureRefusedError
from images.signatures.requirements import SignedBy

_SECONDS = 10.0
_ARMOR = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(?:[^\r\n]+\r?\n)*\r?\n([A-Za-z0-9+/=\s]+?)(?:\r?\n=[A-Za-z0-9+/]{4})?"
    rb"\r?\n-----END PGP PUBLIC KEY BLOCK-----"
)
_STATUS = "[GNUPG:] "
_BAD = ("BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG")


def keyrings(requirement: SignedBy) -> list[bytes]:
    """The keys of a requirement in gpgv's form. Raises KubeletReasonError if a file cannot be used. Blocks."""
    found = contents(requirement.key_path, requirement.key_paths, requirement.key_data)
    return [_binary(name, content) for name, content in found]


async def signed_document(signature: bytes, rings: Sequence[bytes]) -> bytes:
    """The document in a signature that one of the keys made.

    Raises SignatureRefusedError for any other signature, and KubeletReasonError if gpgv is missing.
    """
    program = shutil.which("gpgv")
    if program is None:
        raise KubeletReasonError(
            "SignatureValidationFailed", "gpgv is missing, which signedBy needs: install the package gpgv"
        )
    folder = await in_image_thread(tempfile.TemporaryDirectory, prefix="podkeel-gpgv-")
    try:
        return await _verify(program, Path(folder.name), signature, rings)
    finally:
        await in_image_thread(folder.cleanup)


async def _verify(program: str, folder: Path, signature: bytes, rings: Sequence[bytes]) -> bytes:
    signed = folder / "signature"
    output = folder / "document"
    command = [program, "--homedir", str(folder), "--status-fd", "1", "--output", str(output)]
    for number, ring in enumerate(rings):
        path = folder / f"ring-{number}.gpg"
        await in_image_thread(path.write_bytes, ring)
        command += ["--keyring", str(path)]
    await in_image_thread(signed.write_bytes, signature)
    try:
        done = await processes.run([*command, str(signed)], timeout=_SECONDS, check=False)
    except PodkeelError as error:
        raise SignatureRefusedError(f"gpgv failed: {error}") from error
    lines = [line.removeprefix(_STATUS).split() for line in done.stdout.decode(errors="replace").splitlines()]
    told = [words[0] for words in lines if words]
    bad = [word for word in told if word in _BAD]
    if bad or done.status != 0 or told.count("GOODSIG") != 1 or told.count("VALIDSIG") != 1:
        raise SignatureRefusedError(_reason(bad, [words[1:] for words in lines if words[:1] == ["ERRSIG"]]))
    content = await in_image_thread(_read, output)
    if content is None:
        raise SignatureRefusedError("it holds no signed document, or one that is too large")
    return content


def _reason(bad: Sequence[str], unknown: Sequence[Sequence[str]]) -> str:
    if "ERRSIG" in bad:
        key = unknown[0][0] if unknown and unknown[0] else "unknown"
        return f"it was made with key {key}, which the policy does not have"
    reasons = {"BADSIG": "it is broken", "EXPSIG": "it has expired", "EXPKEYSIG": "its key has expired"}
    return reasons.get(bad[0], "its key was revoked") if bad else "it is not a GPG signature with a document in it"


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CLAIM_BYTES + 1)
    except OSError:
        return None
    return content if len(content) <= MAX_CLAIM_BYTES else None


def _binary(name: str, content: bytes) -> bytes:
    """A file of keys without its armor: gpgv reads only those."""
    if b"-----BEGIN PGP" not in content:
        return content
    blocks = _ARMOR.findall(content)
    try:
        keys = b"".join(base64.b64decode(b"".join(block.split()), validate=True) for block in blocks)
    except binascii.Error as error:
        raise unusable(f"{name} holds keys that cannot be read: {error}") from error
    if not keys:
        raise unusable(f"{name} holds no GPG keys")
    return keys
