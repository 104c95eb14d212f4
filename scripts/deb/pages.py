"""Prints a manual page of the command line in Markdown, for go-md2man: ``pages.py podkeel|podkeel-check VERSION``.

It imports the built package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from podkeel.cli.arguments.parser import build_parser  # type: ignore[import-not-found]

Commands = argparse._SubParsersAction  # noqa: SLF001  # argparse has no public way to its subcommands
SEE_ALSO = "**podkeel**(1), **podkeel.toml**(5), **podkeel-check**(8), /usr/share/doc/podkeel/docs/operations.md"
FILES = """\
*/etc/podkeel/config.toml*, */etc/podkeel/conf.d/\\*.toml*
:   configuration, podkeel.toml(5)

*/run/podkeel/podkeel.sock*
:   socket of the Container Runtime Interface

*/var/lib/podkeel*
:   images, writable layers, and the store of pods and containers
"""


def page(name: str, version: str) -> Iterator[str]:
    """The lines of the page ``podkeel`` or ``podkeel-check``."""
    parser: argparse.ArgumentParser = build_parser()
    section = 1
    if name == "podkeel-check":
        parser, section = subcommands(parser)["check"], 8
    parser.prog = name.replace("-", " ")
    description = parser.description or ""
    summary = description.partition(".")[0]
    yield f'% {name.upper()} {section} "" "podkeel {version}" "Podkeel"\n'
    yield f"# NAME\n\n{name} - {escaped(summary[0].lower() + summary[1:])}\n"
    yield f"# SYNOPSIS\n\n{synopsis(parser)}\n"
    yield f"# DESCRIPTION\n\n{escaped(description)} {escaped(parser.epilog or '')}\n"
    yield from options(parser)
    if section == 1:
        yield "# COMMANDS\n"
        yield from commands(parser)
        yield f"# FILES\n\n{FILES}"
    yield f"# SEE ALSO\n\n{SEE_ALSO}"


def commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A section for each command, and for those below it."""
    for name, command in subcommands(parser).items():
        command.prog = f"{parser.prog} {name}"
        yield f"## {command.prog.removeprefix('podkeel ')}\n\n{synopsis(command)}\n"
        yield f"{escaped(command.description or '')}\n"
        yield from options(command)
        yield from commands(command)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands by name."""
    return {
        name: command
        for action in parser._actions  # noqa: SLF001
        if isinstance(action, Commands)
        for name, command in action.choices.items()
    }


def synopsis(parser: argparse.ArgumentParser) -> str:
    """The usage in one paragraph."""
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    usage = usage.removeprefix(parser.prog) if usage.startswith(parser.prog) else usage.partition(" ")[2]
    return f"**{escaped(parser.prog)}** {escaped(usage.strip())}"


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options and arguments, with their help."""
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, Commands) or action.help == argparse.SUPPRESS:
            continue
        value = f" *{escaped(str(action.metavar))}*" if action.nargs != 0 and action.metavar else ""
        if not action.metavar and action.choices:
            value = f" {escaped('|'.join(map(str, action.choices)))}"
        names = ", ".join(f"**{escaped(name)}**{value}" for name in action.option_strings) or value.strip()
        yield f"{names}\n:   {escaped((action.help or '') % {'default': action.default, 'prog': parser.prog})}\n"


def escaped(text: str) -> str:
    """Text without meaning for Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|~" else letter for letter in text)


if __name__ == "__main__":
    print("\n".join(page(sys.argv[1], sys.argv[2])))
