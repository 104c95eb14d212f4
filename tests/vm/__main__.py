"""Boots virtual machines with Debian's kernel, systemd, cgroup v2 and AppArmor or SELinux, and runs tests in them.

No hardware virtualisation is needed: QEMU translates, at a tenth of the speed. ``make test-vm`` runs this.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.vm.image import PYTHONS, SUITE, MissingError, prepare
from tests.vm.machine import boot
from tests.vm.sources import make_source_disk
from tests.vm.suites import Machine, chosen, suite_names

PROJECT = Path(__file__).parents[2]
SUITE_HELP = "suites to run, or paths and names of tests as pytest takes them; else all suites:"


def main() -> int:
    """Exit status 0 if everything passed."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cache = options.cache.absolute()
    begin = time.monotonic()
    try:
        image = prepare(cache, options.debian)
        results = cache / "last"
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir(parents=True)
        disk = cache / "sources.ext4"
        sources = make_source_disk(disk, PROJECT, cache, suite=options.debian, committed=options.committed)
    except MissingError as error:
        print(f"test-vm cannot run here: {error}", file=sys.stderr)
        return 2
    machines = chosen(options.suites, options.options, options.security)
    booting = functools.partial(boot, image=image, sources=sources, patience=options.patience)
    deadline = begin + options.minutes * 60 - 30
    with ThreadPoolExecutor(options.at_once) as pool, ExitStack() as stack:
        stop = threading.Event()
        stack.callback(stop.set)  # when this is interrupted
        runs = [pool.submit(booting, m, results=results / m.name, deadline=deadline, stop=stop) for m in machines]
        for run in runs:
            run.result()
    outcomes = [outcome for machine in machines for outcome in _outcomes(results / machine.name, machine)]
    print(f"{time.monotonic() - begin:.0f} s in all; logs are in {results}")
    return 0 if all(outcome["good"] for outcome in outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("suites", nargs="*", help=f"{SUITE_HELP} {', '.join(suite_names())}")
    parser.add_argument("--debian", default=SUITE, choices=tuple(PYTHONS), help=f"the release to boot ({SUITE})")
    parser.add_argument("--minutes", type=float, default=29, help="stop after that long (29)")
    parser.add_argument("--patience", type=float, default=5, help="how many times longer than usual tests wait (5)")
    parser.add_argument("--at-once", type=int, default=2, help="how many machines run at the same time (2)")
    parser.add_argument("--committed", action="store_true", help="test the last commit and not the files on disk")
    parser.add_argument("--options", default="", help="lines for the [runtime] table of the agents of chosen tests")
    parser.add_argument("--security", default="apparmor", choices=("apparmor", "selinux"), help="what those run with")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podkeel-vm"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where kernel and disks are kept ({cache})")
    return parser


def _outcomes(results: Path, machine: Machine) -> list[dict[str, Any]]:
    """Print what became of the suites of one machine, and return it."""
    file = results / "result.json"
    if not file.exists():
        print(f"the virtual machine {machine.name} did not finish: see {results}", file=sys.stderr)
        return [{"name": suite.name, "good": False} for suite in machine.suites]
    result: dict[str, Any] = json.loads(file.read_text())
    about = result["machine"]
    print(f"kernel {about['kernel']}, init {about['init']}, lsm {about['lsm']}")
    outcomes: list[dict[str, Any]] = result["suites"]
    for suite in outcomes:
        state = "out of time" if suite["timed_out"] else "failed" if suite["failed"] else "passed"
        suite["good"] = state == "passed" and suite["passed"] > 0
        counts = f"{suite['passed']} passed, {len(suite['failed'])} failed, {suite['skipped']} skipped"
        print(f"{suite['name']:12} {state:11} {suite['seconds']:5.0f} s  {counts}  ({suite['about']})")
        for name in suite["failed"]:
            print(f"    {name}")
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
