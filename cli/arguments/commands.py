"""What all commands of the command line share."""

from __future__ import annotations

import argparse


class Commands:
    """Adds subcommands that share parent options."""

    def __init__(self, commands: argparse._SubParsersAction[argparse.ArgumentParser], parent: argparse.ArgumentParser):
        self._commands = commands
        self._parent = parent

    def add(self, name: str, handler: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        """Add one. ``handler`` is ``module:function`` below ``cli``."""
        parser = self._commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(),
            parents=[self._parent],
        )
        parser.set_defaults(handler=handler)
        return parser


def client_options() -> argparse.ArgumentParser:
    """The options of commands that talk to an agent."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--socket", metavar="URL", help="the agent's socket (default: $PODKEEL_SOCKET, or as in the configuration)"
    )
    return parser
