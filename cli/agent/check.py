"""``podkeel check``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from cli.agent.config import load_for
from cli.text import number, table
from cri.host_check import Check, run_check
from host.errors import PodkeelError, UnavailableError

if TYPE_CHECKING:
    from cli.client import Client

_LEFT = "the plugin closed the connection"  # the reason that the agent records when a plugin has ended
_MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}
_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def check(options: argparse.Namespace) -> int:
    """Print the checks of this host and of the agent on it; 1 if any failed."""
    configuration = load_for(options).configuration
    checks = [*run_check(configuration), *agent_checks(configuration.server.socket, repair=options.repair)]
    failed = sum(item.state == "fail" for item in checks)
    if options.format == "json":
        print(json.dumps({"ok": not failed, "checks": msgspec.to_builtins(checks)}, indent=2))
    else:
        print(as_table(checks, coloured=sys.stdout.isatty()))
    return 1 if failed else 0


def agent_checks(socket: str, *, repair: bool = False) -> list[Check]:
    """The differences that the agent on ``socket`` finds between its store and the kernel; one line if no agent runs.

    With ``repair`` the agent makes the kernel agree with the store.
    """
    path = socket.removeprefix("unix://")
    if not os.access(path, os.F_OK):
        remedy = "start the agent, which repairs at start" if repair else ""
        return [Check("agent", "fail" if repair else "ok", f"none listens on {socket}", remedy)]
    if not os.access(path, os.W_OK):
        return [Check("agent", "warn", f"{socket} is closed to user {os.geteuid()}", "run it as root")]
    from cli.client import Client
    from proto.podkeel.v1 import agent_pb2

    with Client(socket) as client:
        try:
            request = agent_pb2.CheckRequest(repair=repair)
            answer = client.call(request, agent_pb2.CheckResponse, "compare store and kernel")
        except UnavailableError:
            remedy = "it was killed; its next start takes the socket over"
            return [Check("agent", "warn", f"{socket} exists, but no agent answers", remedy)]
        except PodkeelError as error:
            return [Check("agent", "fail", error.message)]
        plugins = _plugin_checks(client)
    if not answer.findings:
        return [Check("agent", "ok", "store and kernel agree"), *plugins]
    remedy = "restart the agent: it repairs more" if repair else "podkeel check --repair, or restart the agent"
    findings = [
        Check(f"agent: {finding.kind}", "ok", f"{finding.object}: {finding.problem}; repaired")
        if finding.repaired
        else Check(f"agent: {finding.kind}", "fail", f"{finding.object}: {finding.problem}", remedy)
        for finding in answer.findings
    ]
    return [*findings, *plugins]


def _plugin_checks(client: Client) -> list[Check]:
    """Where plugins of the node (NRI) connect, and those that failed and did not connect again."""
    from proto.runtime.v1 import cri_pb2

    try:
        request = cri_pb2.StatusRequest(verbose=True)
        answer = client.call(request, cri_pb2.StatusResponse, "ask for the plugins of the node")
    except PodkeelError as error:
        return [Check("NRI", "fail", error.message)]
    information = json.loads(answer.info.get("podkeel", "{}"))
    service, plugins = information.get("nri"), information.get("nriPlugins", [])
    if service is None:
        return []  # an older agent
    if not service["enabled"]:
        return [Check("NRI", "ok", "off (nri.enabled)")]
    there = [plugin["plugin"] for plugin in plugins if "why" not in plugin]
    detail = f"{number(len(there), 'plugin')} connected; "
    if service["problem"]:
        remedy = "set nri.socket to another path, or nri.external_connections to false, and restart the agent"
        checks = [Check("NRI", "warn", detail + service["problem"], remedy)]
    else:
        where = f"others connect to {service['socket']}" if service["socket"] else "no socket for others"
        checks = [Check("NRI", "ok", detail + where)]
    gone = [(plugin["plugin"], plugin["why"]) for plugin in plugins if "why" in plugin]
    failed: dict[str, list[str]] = {}
    for name, why in gone:
        if name not in there and why != _LEFT:
            # a program that ended is listed twice: its connection, and its exit status
            failed[name] = [*failed.get(name, []), why][-2:]
    remedy = "see the plugin's own log, and start it again"
    return [
        *checks,
        *(
            Check("NRI plugin", "warn", f"{_shown(name)}: {'; '.join(map(_shown, whys))}", remedy)
            for name, whys in failed.items()
        ),
    ]


def _shown(text: str) -> str:
    """A text that a plugin chose, with control characters escaped."""
    return ascii(text)[1:-1]


def as_table(checks: Sequence[Check], *, coloured: bool) -> str:
    """A line for each check with its remedy below, and a summary."""
    lines = table(("", "", ""), [(_MARKS[item.state], item.name, item.detail) for item in checks]).splitlines()[1:]
    indent = " " * (5 + max(len(item.name) for item in checks))
    body: list[str] = []
    for item, line in zip(checks, lines, strict=True):
        body.append(f"\x1b[{_COLOURS[item.state]}m{line[0]}\x1b[0m{line[1:]}" if coloured else line)
        if item.state != "ok" and item.remedy:
            body.append(f"{indent}→ {item.remedy}")
    counts = {state: sum(item.state == state for item in checks) for state in _MARKS}
    body.append(f"\n{counts['ok']} ok, {number(counts['warn'], 'warning')}, {counts['fail']} failed")
    return "\n".join(body)
