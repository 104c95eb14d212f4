"""The entry point of the ``podkeel`` command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from cli.arguments.parser import IMAGE_COMMANDS, build_parser
from cli.text import note
from host.errors import PodkeelError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors are one line on standard error and status 1."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in IMAGE_COMMANDS:  # aliases: other image tools have these commands at this place
        note(f"there is no command {words[0]!r}: did you mean `podkeel image {IMAGE_COMMANDS[words[0]]}`?")
        return 2
    options = build_parser().parse_args(words)
    module, _, function = options.handler.partition(":")
    try:
        status = getattr(importlib.import_module(f".{module}", __package__), function)(options)
        sys.stdout.flush()
        return int(status or 0)
    except PodkeelError as error:
        print(f"podkeel: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has closed it. Python would report an error when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
