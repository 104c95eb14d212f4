"""What is run in the virtual machine, in this order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Suite:
    """One run of pytest; ``options`` are lines for the [runtime] table of each agent it starts.

    ``security`` is the kernel's security module that the machine is booted with: apparmor or selinux.
    """

    name: str
    about: str
    tests: tuple[str, ...]
    options: str = ""
    security: str = "apparmor"


# These measure the machine's speed, which is a tenth of a real one's and uneven.
DESELECTED = ("test_a_busy_loop_is_seen_as_processor_time", "test_a_full_reading_is_cheap")

_INTEGRATION = "tests/integration"
_CONFORMANCE = f"{_INTEGRATION}/conformance"

SUITES = (
    Suite(
        "agent",
        "hardening, handlers, limits, statistics, user namespaces, life without the agent; systemd driver, both",
        (
            f"{_INTEGRATION}/agent/test_hardening.py",
            f"{_INTEGRATION}/agent/test_hardening_files.py",
            f"{_INTEGRATION}/agent/test_handlers.py",
            f"{_INTEGRATION}/agent/test_limits.py",
            f"{_INTEGRATION}/agent/test_stats.py",
            f"{_INTEGRATION}/agent/test_user_namespaces.py",
            "tests/faults/test_life_without_agent.py",
        ),
    ),
    Suite(
        "runc",
        "cgroups and ends, systemd driver, runc",
        ("tests/vm/test_cgroup_v2.py", f"{_CONFORMANCE}/test_resources.py", f"{_CONFORMANCE}/test_exec.py"),
        'default_runtime = "runc"',
    ),
    Suite(
        "cgroupfs",
        "cgroups and ends, cgroupfs driver, crun",
        ("tests/vm/test_cgroup_v2.py", f"{_CONFORMANCE}/test_resources.py", f"{_CONFORMANCE}/test_sandboxes.py"),
        'cgroup_driver = "cgroupfs"',
    ),
    Suite("own", "cgroup v2, AppArmor and slices, systemd driver, crun", ("tests/vm",)),
    Suite(
        "spec", "specs with crun and runc directly, cgroup readers", (f"{_INTEGRATION}/spec", f"{_INTEGRATION}/metrics")
    ),
    Suite(
        "conformance", "the CRI, systemd driver, crun", (_CONFORMANCE, f"{_INTEGRATION}/agent/test_pod_lifecycle.py")
    ),
    Suite("quota", "project quotas of ext4", (f"{_INTEGRATION}/agent/test_project_quota.py",)),
    Suite("selinux", "SELinux without enforcement, systemd driver", ("tests/vm/test_selinux.py",), security="selinux"),
)

CHOSEN = "chosen"
"""The suite of tests that were named one by one."""


def chosen(wanted: Sequence[str], options: str, security: str) -> list[Suite]:
    """The suites of those names, or all; what is no suite's name is a test, and those make a suite of their own."""
    suites = [suite for suite in SUITES if not wanted or suite.name in wanted]
    tests = tuple(name for name in wanted if name not in {suite.name for suite in SUITES})
    return [*suites, Suite(CHOSEN, "chosen tests", tests, options, security)] if tests else suites


def write_suites(suites: Sequence[Suite], file: Path) -> None:
    """Tell the virtual machine what to run."""
    file.write_text(json.dumps([asdict(suite) for suite in suites]))


def read_suites(file: Path) -> list[Suite]:
    """What ``write_suites`` wrote."""
    return [Suite(**{**fields, "tests": tuple(fields["tests"])}) for fields in json.loads(file.read_text())]
