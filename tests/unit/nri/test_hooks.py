"""Hooks that tell of what has happened keep nobody waiting for it, whatever goes wrong in them."""

from __future__ import annotations

import logging

import pytest

from runtime.nri.hooks import never_failing


async def test_an_unexpected_error_is_logged_and_the_caller_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    @never_failing
    async def stopped_container() -> None:
        raise UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")

    with caplog.at_level(logging.ERROR):
        await stopped_container()
    assert "nri: stopped_container failed" in caplog.text
