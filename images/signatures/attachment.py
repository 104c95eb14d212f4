"""A sigstore signature as a registry has it."""

from __future__ import annotations

import msgspec


class Attachment(msgspec.Struct, frozen=True):
    """A sigstore signature as the registry has it: ``payload`` with its annotations, or a bundle."""

    payload: bytes
    is_bundle: bool = False
    signature: str = ""
    certificate: str = ""
    chain: str = ""
    log_entry: str = ""
