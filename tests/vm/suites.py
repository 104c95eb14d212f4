"""What is run in the virtual machine, in this order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """One run of pytest; ``options`` are lines for the [runtime] table of each agent it starts."""

    name: str
    about: str
    tests: tuple[str, ...]
    options: str = ""


# These measure the machine's speed, which is a tenth of a real one's and uneven.
DESELECTED = ("test_a_busy_loop_is_seen_as_processor_time", "test_a_full_reading_is_cheap")

_INTEGRATION = "tests/integration"
_CONFORMANCE = f"{_INTEGRATION}/conformance"

SUITES = (
    Suite("own", "cgroup v2, AppArmor and slices, systemd driver, crun", ("tests/vm",)),
    Suite(
        "spec", "specs with crun and runc directly, cgroup readers", (f"{_INTEGRATION}/spec", f"{_INTEGRATION}/metrics")
    ),
    Suite(
        "conformance", "the CRI, systemd driver, crun", (_CONFORMANCE, f"{_INTEGRATION}/agent/test_pod_lifecycle.py")
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
    Suite(
        "agent",
        "hardening, statistics, user namespaces, life without the agent; systemd driver, crun",
        (
            f"{_INTEGRATION}/agent/test_hardening.py",
            f"{_INTEGRATION}/agent/test_hardening_files.py",
            f"{_INTEGRATION}/agent/test_stats.py",
            f"{_INTEGRATION}/agent/test_user_namespaces.py",
            "tests/faults/test_life_without_agent.py",
        ),
    ),
)

CHOSEN = "chosen"
"""The suite of tests that were named one by one."""


def chosen(wanted: list[str], options: str) -> list[Suite]:
    """The suites of those names, or all; what is no suite's name is a test, and these are a suite with ``options``."""
    suites = [suite for suite in SUITES if not wanted or suite.name in wanted]
    tests = tuple(name for name in wanted if name not in {suite.name for suite in SUITES})
    return [*suites, Suite(CHOSEN, "chosen tests", tests, options)] if tests else suites
