"""Kubernetes quantities: ``250m``, ``1.5``, ``128Mi``, ``1e3``.

Follows https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/.
"""

from __future__ import annotations

import re
from fractions import Fraction

_FORM = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:([eE][+-]?[0-9]{1,3})|([numkMGTPE]|[KMGTPE]i)?)\Z")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}


def quantity(text: str) -> Fraction:
    """The exact number of the quantity ``text``. Raises ValueError if it is not a quantity."""
    match = _FORM.match(text)
    if match is None:
        raise ValueError(f'expected a quantity such as "250m", "1.5" or "128Mi", got "{text}"')
    number, exponent, suffix = Fraction(match[1]), str(match[2] or ""), str(match[3] or "")
    if suffix in _BINARY:
        return number * Fraction(1024 ** _BINARY[suffix])
    power = int(exponent[1:]) if exponent else _DECIMAL[suffix]
    return number * Fraction(10) ** power
