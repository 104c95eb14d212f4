"""Plugins for tests: classes over the sample stub, each run in a separate thread."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

STUB = Path(__file__).parents[3] / "manifests/nri/stub.py"


def load_stub() -> ModuleType:
    """The module that plugin authors get."""
    spec = importlib.util.spec_from_file_location("nri_stub", STUB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stub = load_stub()


def run_in_thread(plugin: Any) -> threading.Thread:
    """Register and serve a plugin until its agent closes the connection."""
    thread = threading.Thread(target=plugin.run, daemon=True)
    thread.start()
    return thread
