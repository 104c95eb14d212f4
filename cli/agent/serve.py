"""``podkeel serve``."""

from __future__ import annotations

import argparse
import gc

from cli.agent.config import load_for
from cli.agent.rights import need_root


def serve(options: argparse.Namespace) -> int:
    """Run the agent in this process until a signal ends it."""
    load_for(options)  # users who may not run the agent get the errors of its configuration too
    need_root("serve")
    gc.disable()  # while modules are loaded, the collector finds nothing, and takes a tenth of the time
    from cri.server import serve as serve_agent

    gc.freeze()
    gc.enable()
    serve_agent(lambda: load_for(options).configuration, adopt=options.adopt)
    return 0
