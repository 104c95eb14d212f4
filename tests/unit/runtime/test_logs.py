"""The link by which conmon finds a container's log."""

from __future__ import annotations

from pathlib import Path

from runtime.logs import LogLink


def test_a_log_counts_as_opened_only_after_conmon_renamed_the_link(tmp_path: Path) -> None:
    link = LogLink(tmp_path)
    for name in ("log-first", "log-second"):
        link.lead_next_to(tmp_path / name)
        assert not link.leads_to(tmp_path / name)
        (tmp_path / "log.tmp").rename(link.path)  # as conmon does once it has opened it
        assert link.leads_to(tmp_path / name)
        assert link.waiting() is None
