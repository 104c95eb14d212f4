"""The error about one signature that does not count."""

from __future__ import annotations


class SignatureRefusedError(Exception):
    """Why a signature is not accepted, as a sentence about it. Another signature of the image may be."""
