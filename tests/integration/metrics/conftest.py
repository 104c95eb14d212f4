"""Cgroups of the tests' own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from host.cgroups import discover
from tests.integration.metrics.own_cgroup import OwnCgroup


@pytest.fixture
def cgroup() -> Iterator[OwnCgroup]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    own = OwnCgroup(discover(), f"/podkeel-test-metrics-{os.getpid()}")
    try:
        yield own
    finally:
        own.reader.close()
        own.remove()
