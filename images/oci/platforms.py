"""Selects the image in an index that suits this machine."""

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
# The other architecture that a machine can run (containerd's platforms.Only), used if no image has its own one.
_ALSO_RUN = {"amd64": "386", "arm64": "arm"}
OTHER_ARCHITECTURE = 9  # the best suitability of another architecture


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and architecture, named as in Go and in image indexes."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def normalized(self) -> Platform:
        """The same platform with Go's names: ``x86_64`` becomes amd64. The variant v1 of amd64 is left out."""
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
    """How well an image for ``offered`` runs on ``machine``. 0: not at all; a higher number is better."""
    offered = offered.normalized()
    if offered.os != machine.os:
        return 0
    if offered.architecture != machine.architecture:
        return _other_architecture(offered, machine)
    if offered.variant == machine.variant:
        return 100
    if offered.architecture == "arm64" and {offered.variant, machine.variant} == {"", "v8"}:
        return 99
    if not offered.variant:
        return 50
    mine, theirs = _number(machine.variant), _number(offered.variant)
    # An arm v7 machine runs v6 and v5 images. Whether an amd64 machine runs v2 images is unknown.
    return OTHER_ARCHITECTURE + theirs if 0 < theirs < mine else 0


def _other_architecture(offered: Platform, machine: Platform) -> int:
    """The suitability of the other architecture that ``machine`` can run. An arm image without variant is v7."""
    if _ALSO_RUN.get(machine.architecture) != offered.architecture:
        return 0
    if offered.architecture != "arm":
        return OTHER_ARCHITECTURE
    variant = _number(offered.variant or "v7")
    return 1 + variant if 5 <= variant <= _number(machine.variant or "v8") < OTHER_ARCHITECTURE else 0


def _number(variant: str) -> int:
    digits = variant.removeprefix("v")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 4 else 0
