"""Choosing the image of an index that suits this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armhf": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armel": ("arm", "v6"),
    "i686": ("386", ""),
    "i386": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
    "loongarch64": ("loong64", ""),
}
# What a machine also runs (containerd's platforms.Only). It is taken if there is nothing for the machine itself.
_ALSO_RUN = {"amd64": "386", "arm64": "arm"}
OTHER_ARCHITECTURE = 9  # the best suitability of another architecture


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and architecture in Go's words, as image indexes use them."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def normalized(self) -> Platform:
        """The same platform as Go names it: ``x86_64`` is amd64, whose variant v1 is its only one without a number."""
        name = self.architecture.lower()
        architecture, variant = _ARCHITECTURES.get(name, (name, ""))
        variant = self.variant.lower() or variant
        if variant.isascii() and variant.isdigit():
            variant = f"v{variant}"
        if (architecture, variant) == ("amd64", "v1"):
            variant = ""
        return Platform(self.os.lower(), architecture, variant)


def this_machine() -> Platform:
    """The platform this program runs on."""
    machine = os.uname().machine
    architecture, variant = _ARCHITECTURES.get(machine, (machine, ""))
    return Platform("linux", architecture, variant)


def suitability(offered: Platform, machine: Platform) -> int:
    """How well an image for ``offered`` runs on ``machine``; 0 if it does not, more is better."""
    offered = offered.normalized()
    if offered.os != machine.os:
        return 0
    if offered.architecture != machine.architecture:
        return _as_another(offered, machine)
    if offered.variant == machine.variant:
        return 100
    if offered.architecture == "arm64" and {offered.variant, machine.variant} == {"", "v8"}:
        return 99
    if not offered.variant:
        return 50
    mine, theirs = _number(machine.variant), _number(offered.variant)
    # An arm v7 machine runs v6 and v5 images; an amd64 machine is not known to run v2 ones.
    return OTHER_ARCHITECTURE + theirs if 0 < theirs < mine else 0


def _as_another(offered: Platform, machine: Platform) -> int:
    """How well the older architecture that ``machine`` also runs suits it; an arm image without variant is a v7 one."""
    if _ALSO_RUN.get(machine.architecture) != offered.architecture:
        return 0
    if offered.architecture != "arm":
        return OTHER_ARCHITECTURE
    variant = _number(offered.variant or "v7")
    return 1 + variant if 5 <= variant <= _number(machine.variant or "v8") < OTHER_ARCHITECTURE else 0


def _number(variant: str) -> int:
    digits = variant.removeprefix("v")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 4 else 0
