from __future__ import annotations

from pathlib import Path

from cli.agent.check import agent_checks, as_table
from cri.host_check import Check


def test_the_table_shows_remedies_of_what_is_not_ok() -> None:
    checks = [
        Check("conmon", "ok", "version 2", "not shown"),
        Check("run folder", "warn", "on ext4", "use a tmpfs"),
        Check("nft", "fail", "missing"),
    ]
    assert as_table(checks, coloured=False) == (
        "✓  conmon      version 2\n"
        "!  run folder  on ext4\n"
        "               → use a tmpfs\n"
        "✗  nft         missing\n"
        "\n"
        "1 ok, 1 warning, 1 failed"
    )
    assert "\x1b[31m✗\x1b[0m  nft" in as_table(checks, coloured=True)


def test_an_agent_that_is_missing_or_does_not_answer(tmp_path: Path) -> None:
    (none,) = agent_checks(f"unix://{tmp_path}/none.sock")
    assert (none.state, none.detail) == ("ok", f"none listens on unix://{tmp_path}/none.sock")
    (unrepaired,) = agent_checks(f"unix://{tmp_path}/none.sock", repair=True)
    assert (unrepaired.state, unrepaired.remedy) == ("fail", "start the agent, which repairs at start")
    (tmp_path / "dead.sock").touch()
    (dead,) = agent_checks(f"unix://{tmp_path}/dead.sock")
    assert dead.state == "warn"
