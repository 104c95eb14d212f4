from __future__ import annotations

from fractions import Fraction

import pytest

from host.quantities import quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", Fraction(0)),
        ("1", Fraction(1)),
        ("1.5", Fraction(3, 2)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("250m", Fraction(1, 4)),
        ("100n", Fraction(1, 10**7)),
        ("2u", Fraction(2, 10**6)),
        ("1k", Fraction(1000)),
        ("1Ki", Fraction(1024)),
        ("128Mi", Fraction(128 * 2**20)),
        ("1.5Gi", Fraction(3 * 2**29)),
        ("3M", Fraction(3_000_000)),
        ("1E", Fraction(10**18)),
        ("1e3", Fraction(1000)),
        ("12E-1", Fraction(6, 5)),
        ("-1", Fraction(-1)),
    ],
)
def test_quantities(text: str, number: Fraction) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize(
    "text", ["", "Mi", "1 Gi", "1mi", "1K", "1.2.3", "0x10", "1e", "ten", "1Gi\n", "1e999999999", "٣M"]
)
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="expected a quantity"):
        quantity(text)
