"""``podkeel reset``."""

from __future__ import annotations

import argparse
import gc
import sys

from cli.agent.config import load_for
from cli.agent.rights import need_root
from host.errors import InvalidArgumentError


def reset(options: argparse.Namespace) -> int:
    """Take down what an agent of this configuration left on the host."""
    loaded = load_for(options)
    runtime = loaded.configuration.runtime
    what = (
        f"everything in {runtime.run_dir} and {runtime.data_dir}, and the containers, links and rules that belong to it"
    )
    if not options.yes:
        raise InvalidArgumentError(f"this removes {what}; say --yes to do it")
    need_root("reset")
    gc.disable()  # while modules are loaded, the collector finds nothing, and takes a tenth of the time
    from cri.reset import reset as reset_agent

    gc.enable()
    for sentence in reset_agent(loaded.configuration, force=options.force):
        print(f"given up: {sentence}", file=sys.stderr)
    print(f"removed {what}")
    return 0
