from __future__ import annotations

import pytest

from host.errors import InvalidArgumentError
from network.attachment import Bandwidth
from network.bandwidth import EGRESS_ANNOTATION, INGRESS_ANNOTATION, bandwidth_of, burst_bytes


@pytest.mark.parametrize(
    ("quantity", "rate"),
    [
        ("10M", 10_000_000),
        ("1k", 1_000),
        ("1Mi", 1_048_576),
        ("1Ki", 1_024),
        ("+5000", 5_000),
        ("1P", 10**15),
        ("5000000m", 5_000),
    ],
)
def test_quantities(quantity: str, rate: int) -> None:
    assert bandwidth_of({INGRESS_ANNOTATION: quantity}) == Bandwidth(ingress=rate)
    assert bandwidth_of({EGRESS_ANNOTATION: quantity, "other": "x"}) == Bandwidth(egress=rate)


@pytest.mark.parametrize("quantity", ["fast", "10 M", "1MB"])
def test_what_is_no_quantity(quantity: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is not a quantity"):
        bandwidth_of({INGRESS_ANNOTATION: quantity})


@pytest.mark.parametrize("quantity", ["-5M", "999", "2P", "1E", "0", "1e100"])
def test_rates_out_of_range(quantity: str) -> None:
    with pytest.raises(InvalidArgumentError, match="use 1k to 1P"):
        bandwidth_of({EGRESS_ANNOTATION: quantity})


def test_no_annotation_is_no_limit() -> None:
    assert bandwidth_of({}) == Bandwidth()


def test_bursts_hold_packets_and_fit_the_kernels_field() -> None:
    assert burst_bytes(1_000, 9000) == 4 * 9014
    assert burst_bytes(10**9, 1500) == 2_500_000
    assert burst_bytes(10**15, 1500) == 2**32 - 1
