"""Boots a virtual machine with Debian's kernel, systemd, cgroup v2 and AppArmor, and runs tests in it.

No hardware virtualisation is needed: QEMU translates, at a tenth of the speed. ``make test-vm`` runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.vm.image import Image, MissingError, make_source_disk, prepare
from tests.vm.suites import CHOSEN, SUITES

PROJECT = Path(__file__).parents[2]
SUITE_HELP = "suites to run, or paths and names of tests as pytest takes them; else all suites:"
MASKED = ("apparmor.service", "docker-registry.service", "apt-daily.timer", "apt-daily-upgrade.timer")

# The first line that virtme-ng runs as root once systemd is up; the shared folder is mounted at /mnt.
GUEST = """#!/bin/sh
set -e
export PATH=/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin HOME=/root
mkdir -p /run/sources {project} {python}
mount /dev/vdb /run/sources
mount --bind /run/sources/project {project}
[ ! -d /run/sources/python ] || mount --bind /run/sources/python {python}
mkdir -p /run/sources/tmp
chmod 1777 /run/sources/tmp
mount --bind /run/sources/tmp /tmp
cd {project}
exec .venv/bin/python -m tests.vm.guest /mnt {seconds} {patience} {options} {suites}
"""


def main() -> int:
    """Exit status 0 if everything passed."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cache = options.cache.absolute()
    begin = time.monotonic()
    try:
        image = prepare(cache)
        results = cache / "last"
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir(parents=True)
        disk = cache / "sources.ext4"
        make_source_disk(disk, PROJECT, cache, committed=options.committed)
    except MissingError as error:
        print(f"test-vm cannot run here: {error}", file=sys.stderr)
        return 2
    seconds = options.minutes * 60 - (time.monotonic() - begin) - 30
    _boot(image, disk, results, seconds, options)
    return _report(results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("suites", nargs="*", help=f"{SUITE_HELP} {', '.join(s.name for s in SUITES)}")
    parser.add_argument("--minutes", type=float, default=29, help="stop after that long (29)")
    parser.add_argument("--patience", type=float, default=5, help="how many times longer than usual tests wait (5)")
    parser.add_argument("--committed", action="store_true", help="test the last commit and not the files on disk")
    parser.add_argument("--options", default="", help="lines for the [runtime] table of the agents of chosen tests")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podkeel-vm"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where kernel and disks are kept ({cache})")
    return parser


def _boot(image: Image, disk: Path, results: Path, seconds: float, options: argparse.Namespace) -> None:
    """Run the machine until it ends by itself, or for that long."""
    python = sys.base_prefix if sys.base_prefix != "/usr" else "/run/sources"
    script = results / "guest.sh"
    script.write_text(
        GUEST.format(
            project=PROJECT,
            python=python,
            seconds=int(seconds) - 60,
            patience=options.patience,
            options=shlex.quote(options.options),
            suites=shlex.join(options.suites),
        )
    )
    script.chmod(0o755)
    root = disk.with_name("root.ext4")
    subprocess.run(["cp", "--sparse=always", image.root_disk, root], check=True)
    command = [
        str(image.virtme / "vng"),
        "--run",
        str(image.kernel),
        "--disable-kvm",
        "--force-9p",
        "--systemd",
        "--rw",
    ]
    command += ["--root-disk", str(root), "--root-fstype", "ext4", "--disk", str(disk), f"--rwdir=mnt={results}"]
    command += ["--busybox", shutil.which("busybox") or "busybox", "--cpus", "2", "--memory", "4G", "--verbose"]
    for option in ("apparmor=1", "security=apparmor", *(f"systemd.mask={unit}" for unit in MASKED)):
        command += ["--append", option]
    command += ["--exec", "/mnt/guest.sh"]
    # virtme-ng wants a terminal, which script(1) gives it.
    terminal = ["script", "--quiet", "--flush", "--command", shlex.join(command), str(results / "console.log")]
    environment = {**os.environ, "PATH": f"{image.virtme}:{os.environ['PATH']}"}
    machine = subprocess.Popen(
        terminal, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        _follow(machine, results, time.monotonic() + seconds)
    finally:
        _end(machine)
        root.unlink()


def _follow(machine: subprocess.Popen[bytes], results: Path, deadline: float) -> None:
    """Print what fails, and which suite runs, while the machine does."""
    seen: dict[Path, int] = {}
    while machine.poll() is None and time.monotonic() < deadline and not (results / "result.json").exists():
        time.sleep(2)
        for log in sorted(results.glob("*.log"), key=lambda path: path.stat().st_mtime):
            if log.name == "console.log":
                continue
            if log not in seen:
                print(f"{log.stem} …", flush=True)
            lines = log.read_text(errors="replace").splitlines()
            for line in lines[seen.get(log, 0) :]:
                if line.startswith("failed"):
                    print(f"  {line}", flush=True)
            seen[log] = len(lines)


def _end(machine: subprocess.Popen[bytes]) -> None:
    """Give the machine the time to power off, then kill what is left of it: the whole session is ours."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        machine.wait(timeout=20)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == machine.pid or int(stat[3]) == machine.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
    machine.wait()


def _report(results: Path) -> int:
    try:
        result: dict[str, Any] = json.loads((results / "result.json").read_text())
    except FileNotFoundError:
        print(f"the virtual machine did not finish: see {results}/console.log", file=sys.stderr)
        return 1
    machine = result["machine"]
    print(f"kernel {machine['kernel']}, init {machine['init']}, lsm {machine['lsm']}")
    about = {suite.name: suite.about for suite in SUITES} | {CHOSEN: "chosen tests"}
    good = True
    for suite in result["suites"]:
        state = "out of time" if suite["timed_out"] else "failed" if suite["failed"] else "passed"
        good = good and state == "passed" and suite["passed"] > 0
        counts = f"{suite['passed']} passed, {len(suite['failed'])} failed, {suite['skipped']} skipped"
        print(f"{suite['name']:12} {state:11} {suite['seconds']:5.0f} s  {counts}  ({about[suite['name']]})")
        for name in suite["failed"]:
            print(f"    {name}")
    print(f"logs are in {results}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
