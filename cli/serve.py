"""``podkeel serve``."""

from __future__ import annotations

import argparse

from cli.config import load_for


def serve(options: argparse.Namespace) -> int:
    """Run the agent in this process until a signal ends it."""
    loaded = load_for(options)
    from cri.server import serve as serve_agent

    serve_agent(loaded.configuration)
    return 0
