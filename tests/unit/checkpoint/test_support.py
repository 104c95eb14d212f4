"""What is found out of CRIU and the OCI runtimes: programs that say what others on other nodes do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from host.errors import UnsupportedError
from runtime.checkpoint.options import CheckpointOptions
from runtime.checkpoint.support import CheckpointSupport
from runtime.oci.oci_runtime import RuntimeFeatures


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def runtime(folder: Path, name: str, version: str) -> Any:
    path = program(folder / name, f"printf '{version}'")
    first = version.partition("\\n")[0]
    return SimpleNamespace(
        name=name, program=path, features=RuntimeFeatures(version=first), options=SimpleNamespace(path=name)
    )


def probed(folder: Path, criu: str, *, enabled: bool = True) -> CheckpointSupport:
    handlers = [
        runtime(folder, "runc", "runc version 1.1.15\\n"),
        runtime(folder, "crun", "crun version 1.8.1\\n+SYSTEMD +SECCOMP +YAJL\\n"),
    ]
    support = CheckpointSupport(
        CheckpointOptions(enabled=enabled, criu_path=criu),
        SimpleNamespace(working=lambda: handlers),  # type: ignore[arg-type]  # all that it asks of Handlers
    )

    async def probe() -> None:
        support.begin()
        await support.known()

    asyncio.run(probe())
    return support


WORKS = 'case "$1" in --version) echo "Version: 4.1.1";; check) echo "Looks good.";; esac'


def test_which_handlers_are_able(tmp_path: Path) -> None:
    support = probed(tmp_path, program(tmp_path / "criu", WORKS))
    assert support.report() == {
        "enabled": True,
        "criu": "4.1.1",
        "problem": "",
        "handlers": {"runc": "able", "crun": "crun is built without CRIU"},
        "podsAndRestores": {
            "runc": "it saves containers and restores none: use crun",
            "crun": "crun is built without CRIU",
        },
    }
    assert support.closes_connections
    assert support.environment(Path("/conf"))["PATH"].startswith(f"{tmp_path}:")
    with pytest.raises(UnsupportedError, match="'crun' cannot make checkpoints on this node: crun is built without"):
        asyncio.run(support.require(object(), "crun"))  # type: ignore[arg-type]  # only looked at for None
    asyncio.run(support.require(object(), "runc"))  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('case "$1" in --version) echo "Version: 3.17";; *) echo "Error (x.c:1): no ptrace" >&2; exit 1;; esac',
         "CRIU 3.17 does not work with this kernel (criu check: Error (x.c:1): no ptrace)"),
        ("echo what; exit 1", "does not print its version: what"),
        ("exit 3", "does not print its version: exit status 3"),
    ],
)  # fmt: skip
def test_why_none_is(tmp_path: Path, script: str, words: str) -> None:
    support = probed(tmp_path, program(tmp_path / "criu", script))
    assert words in support.problem
    assert words in support.report()["handlers"]["runc"]


def test_without_criu_and_switched_off(tmp_path: Path) -> None:
    assert "CRIU is not installed" in probed(tmp_path, str(tmp_path / "missing")).problem
    assert "checkpoint.enabled" in probed(tmp_path, program(tmp_path / "criu", WORKS), enabled=False).problem
