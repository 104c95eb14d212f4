"""The link by which conmon finds a container's log."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.logs import LogLink


def test_a_log_is_not_taken_for_opened_because_an_earlier_one_had_its_descriptor(tmp_path: Path) -> None:
    link = LogLink(tmp_path)
    descriptor = os.open(tmp_path / "first", os.O_WRONLY | os.O_CREAT)
    try:
        link.lead_to(descriptor)
        os.dup2(new := os.open(tmp_path / "second", os.O_WRONLY | os.O_CREAT), descriptor)
        os.close(new)
        link.lead_next_to(descriptor)
        assert not link.leads_to(descriptor)
        (tmp_path / "log.tmp").rename(link.path)  # as conmon does once it has opened it
        assert link.leads_to(descriptor)
    finally:
        os.close(descriptor)
