"""What is run in virtual machines, each of which has some of the suites."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Suite:
    """One run of pytest; ``options`` are lines for the [runtime] table of each agent it starts."""

    name: str
    about: str
    tests: tuple[str, ...]
    options: str = ""


@dataclass(frozen=True)
class Machine:
    """A virtual machine, and what is run there in this order.

    ``security`` is the kernel's security module that it is booted with: apparmor or selinux.
    """

    name: str
    security: str
    suites: tuple[Suite, ...]


# The first measures the machine's speed, which is a tenth of a real one's and uneven; the second takes two minutes
# there to make the events that a subscriber does not read.
DESELECTED = (
    "test_a_busy_loop_is_seen_as_processor_time",
    "test_subscriber_that_does_not_read_is_closed_so_that_it_lists_again",
)

_INTEGRATION = "tests/integration"
_CONFORMANCE = f"{_INTEGRATION}/conformance"

_CONFORMANCE_SUITES = (
    Suite(
        "conformance", "the CRI, systemd driver, crun", (_CONFORMANCE, f"{_INTEGRATION}/agent/test_pod_lifecycle.py")
    ),
    Suite(
        "spec", "specs with crun and runc directly, cgroup readers", (f"{_INTEGRATION}/spec", f"{_INTEGRATION}/metrics")
    ),
    Suite(
        "cgroupfs",
        "cgroups and ends, cgroupfs driver, crun",
        ("tests/vm/test_cgroup_v2.py", f"{_CONFORMANCE}/test_resources.py"),
        'cgroup_driver = "cgroupfs"',
    ),
    Suite("quota", "project quotas of ext4 and xfs", (f"{_INTEGRATION}/agent/test_project_quota.py",)),
)
_AGENT_SUITES = (
    Suite("own", "cgroup v2, AppArmor and slices, systemd driver, crun", ("tests/vm",)),
    Suite(
        "agent",
        "hardening, limits, statistics, user namespaces, life without the agent; systemd driver, both runtimes",
        (
            f"{_INTEGRATION}/agent/test_hardening.py",
            f"{_INTEGRATION}/agent/test_hardening_files.py::test_other_users_of_the_node_reach_nothing_of_containers",
            f"{_INTEGRATION}/agent/test_limits.py",
            f"{_INTEGRATION}/agent/test_stats.py",
            f"{_INTEGRATION}/agent/test_user_namespaces.py",
            "tests/faults/test_life_without_agent.py",
        ),
    ),
    Suite(
        "runc",
        "cgroups and ends, systemd driver, runc",
        ("tests/vm/test_cgroup_v2.py", f"{_CONFORMANCE}/test_resources.py"),
        'default_runtime = "runc"',
    ),
)
_SELINUX_SUITES = (Suite("selinux", "SELinux without enforcement, systemd driver", ("tests/vm/test_selinux.py",)),)

MACHINES = (
    Machine("conformance", "apparmor", _CONFORMANCE_SUITES),
    Machine("agent", "apparmor", _AGENT_SUITES),
    Machine("selinux", "selinux", _SELINUX_SUITES),
)
CHOSEN = "chosen"
"""The machine, and the suite, of tests that were named one by one."""


def suite_names() -> list[str]:
    """All suites there are."""
    return [suite.name for machine in MACHINES for suite in machine.suites]


def chosen(wanted: Sequence[str], options: str, security: str) -> list[Machine]:
    """The machines with the suites of those names, or all; what is no suite's name is a test, and those are a suite."""
    machines = []
    for machine in MACHINES:
        if suites := tuple(suite for suite in machine.suites if not wanted or suite.name in wanted):
            machines.append(Machine(machine.name, machine.security, suites))
    tests = tuple(name for name in wanted if name not in suite_names())
    suite = Suite(CHOSEN, "chosen tests", tests, options)
    return [*machines, Machine(CHOSEN, security, (suite,))] if tests else machines


def write_suites(suites: Sequence[Suite], file: Path) -> None:
    """Set what the virtual machine runs."""
    file.write_text(json.dumps([asdict(suite) for suite in suites]))


def read_suites(file: Path) -> list[Suite]:
    """What ``write_suites`` wrote."""
    return [Suite(**{**fields, "tests": tuple(fields["tests"])}) for fields in json.loads(file.read_text())]
