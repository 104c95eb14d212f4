"""A pytest plugin for slow machines: each test's outcome and seconds as it ends, each failure at once."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        print(f"\n{report.outcome:7} {report.duration:6.1f} s  {report.nodeid} [{report.when}]", flush=True)
    if report.failed:
        print(report.longreprtext, flush=True)
        for title, content in report.sections:
            print(f"--- {title}\n{content}", flush=True)
