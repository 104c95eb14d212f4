"""Hooks about past events delay no caller, even if they fail."""

from __future__ import annotations

import logging

import pytest

from runtime.hooks import Hooks
from runtime.nri.hooks import never_failing


async def test_an_unexpected_error_is_logged_and_the_caller_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    @never_failing
    async def stopped_container() -> None:
        raise UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")

    with caplog.at_level(logging.ERROR):
        await stopped_container()
    assert "nri: stopped_container failed" in caplog.text


async def test_what_is_told_beside_work_that_fails_is_told_all_the_same() -> None:
    told = []

    async def work() -> None:
        raise OSError("the disk is full")

    async def tell() -> None:
        told.append("StopContainer")

    with pytest.raises(OSError, match="the disk is full"):
        await Hooks().beside(work(), tell())
    assert told == ["StopContainer"]
