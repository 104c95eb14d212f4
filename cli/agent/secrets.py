"""Hides credentials in text for bug reports: in addresses, in headers, and behind names such as ``password``."""

from __future__ import annotations

import re

HIDDEN = "[hidden]"
_NAMES = (
    r"pass(?:word|wd|phrase)?|secret|token|credentials?|signature|sig|auth|authorization|api[-_]?key|access[-_]?key|"
    r"private[-_]?key"
)
# Whole names, and names that end or begin with one of these words: X-Amz-Signature, registry_password, tokenValue.
_NAME = rf"(?:[A-Za-z0-9_.-]*[_.-])?(?:{_NAMES})(?:[_.-][A-Za-z0-9_.-]*)?"
_VALUE = r"""(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\s"'&,;}\])]+)"""
_PATTERNS = (
    # user:password@ of an address
    (re.compile(r"(?<=://)[^/\s@\"']+@"), f"{HIDDEN}@"),
    # the scheme and the value of an Authorization header
    (re.compile(r"\b(Bearer|Basic|Negotiate)\s+[A-Za-z0-9._~+/=-]{4,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    # NAME=VALUE, NAME: VALUE and "NAME": "VALUE"
    (re.compile(rf"""(?<![A-Za-z0-9_.-])({_NAME}["']?\s*[=:]\s*){_VALUE}""", re.IGNORECASE), rf"\1{HIDDEN}"),
    # --password VALUE
    (re.compile(rf"(?<!\S)(--{_NAME}\s+){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # the three parts of a JSON Web Token
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
)


def without_secrets(text: str) -> str:
    """The text with each credential that can be recognised replaced."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
