"""Inside the virtual machine: runs the suites one after another and leaves their logs and outcomes on the host."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from tests.vm.suites import DESELECTED, Suite, read_suites


def main() -> int:
    """``python -m tests.vm.guest FOLDER SECONDS PATIENCE``: runs the suites that the folder names; results go there."""
    folder, deadline, patience = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2]), sys.argv[3]
    outcomes = [_run(suite, folder, deadline, patience) for suite in read_suites(folder / "suites.json")]
    machine = {"kernel": platform.release(), "init": Path("/proc/1/comm").read_text().strip()}
    machine["lsm"] = Path("/sys/kernel/security/lsm").read_text()
    machine["controllers"] = Path("/sys/fs/cgroup/cgroup.controllers").read_text().strip()
    (folder / "result.json").write_text(json.dumps({"machine": machine, "suites": outcomes}))
    return 0


def _run(suite: Suite, folder: Path, deadline: float, patience: str) -> dict[str, object]:
    log, report = folder / f"{suite.name}.log", folder / f"{suite.name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--no-summary", "--tb=short", "-p", "tests.vm.progress"]
    command += [f"--junit-xml={report}", "-k", " and ".join(f"not {name}" for name in DESELECTED), *suite.tests]
    environment = {
        **os.environ,
        "PODKEEL_TEST_PATIENCE": patience,
        "PODKEEL_TEST_RUNTIME_OPTIONS": suite.options,
    }
    begin = time.monotonic()
    timed_out = False
    with log.open("wb") as output:
        try:
            subprocess.run(
                command,
                stdout=output,
                stderr=output,
                env=environment,
                timeout=max(deadline - begin, 0.1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            timed_out = True
    outcome: dict[str, object] = {"name": suite.name, "about": suite.about}
    outcome |= {"seconds": time.monotonic() - begin, "timed_out": timed_out}
    return outcome | _counts(report)


def _counts(report: Path) -> dict[str, object]:
    if not report.exists():
        return {"passed": 0, "failed": [], "skipped": 0}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


if __name__ == "__main__":
    sys.exit(main())
