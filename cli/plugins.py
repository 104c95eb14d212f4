"""``podkeel nri``: the connected NRI plugins of the node, and those that were disconnected."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from cli.connect import connect
from cli.text import table
from proto.runtime.v1 import cri_pb2


def nri(options: argparse.Namespace) -> None:
    """Print a line for each plugin: its number of events and calls, and its last error or why it was disconnected."""
    with connect(options) as client:
        request = cri_pb2.StatusRequest(verbose=True)
        answer = client.call(request, cri_pb2.StatusResponse, "ask for the plugins of the node")
    plugins = json.loads(answer.info.get("podkeel", "{}")).get("nriPlugins", [])
    print(table(("PLUGIN", "STATE", "EVENTS", "CALLS", "LAST ERROR"), [_row(plugin) for plugin in plugins]))


def _row(plugin: Mapping[str, Any]) -> tuple[object, ...]:
    name = ascii(plugin.get("plugin", ""))[1:-1]  # a plugin chooses these texts: escape control characters
    if "why" in plugin:
        return name, "gone", "", "", ascii(plugin["why"])[1:-1]
    error = ascii(plugin.get("lastError", ""))[1:-1] or "-"
    return name, "connected", len(plugin["events"]), sum(plugin["calls"].values()), error
