"""Plugins for tests: classes over the sample stub, each run in a separate thread."""

from __future__ import annotations

import threading

from manifests.nri.stub import Plugin


def run_in_thread(plugin: Plugin) -> threading.Thread:
    """Register and serve a plugin until its agent closes the connection."""
    thread = threading.Thread(target=plugin.run, daemon=True)
    thread.start()
    return thread
