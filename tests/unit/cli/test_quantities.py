from __future__ import annotations

from fractions import Fraction

import pytest

from cli.manifest.quantities import cpu_quota, cpu_shares, whole
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


@pytest.mark.parametrize(("cores", "shares"), [("0", 2), ("1m", 2), ("100m", 102), ("1", 1024), ("512", 262_144)])
def test_cpu_shares_are_kubelets(cores: str, shares: int) -> None:
    assert cpu_shares(quantity(cores)) == shares


@pytest.mark.parametrize(("cores", "quota"), [("1m", 1000), ("500m", 50_000), ("2", 200_000), ("0.0005", 1000)])
def test_cpu_quotas_are_kubelets(cores: str, quota: int) -> None:
    assert cpu_quota(quantity(cores)) == quota


def test_bytes_are_rounded_up() -> None:
    assert whole(quantity("100m")) == 1
