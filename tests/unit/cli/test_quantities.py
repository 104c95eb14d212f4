from __future__ import annotations

import pytest

from cli.manifest.quantities import cpu_quota, cpu_shares, whole
from host.quantities import quantity


@pytest.mark.parametrize(("cores", "shares"), [("0", 2), ("1m", 2), ("100m", 102), ("1", 1024), ("512", 262_144)])
def test_cpu_shares_are_kubelets(cores: str, shares: int) -> None:
    assert cpu_shares(quantity(cores)) == shares


@pytest.mark.parametrize(("cores", "quota"), [("1m", 1000), ("500m", 50_000), ("2", 200_000), ("0.0005", 1000)])
def test_cpu_quotas_are_kubelets(cores: str, quota: int) -> None:
    assert cpu_quota(quantity(cores)) == quota


def test_bytes_are_rounded_up() -> None:
    assert whole(quantity("100m")) == 1
