#!/usr/bin/env python3
"""A plugin that gives containers the devices listed in an annotation of their pod.

The annotation ``devices.noderesource.dev/container.NAME`` holds a list in YAML. ``devices.noderesource.dev/pod`` is for
all containers of the pod::

    - path: /dev/nri-null
      type: c
      major: 1
      minor: 3
      file_mode: 438
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from stub import Plugin, nri_pb2  # noqa: E402  # both are found by the line above

KEY = "devices.noderesource.dev"


class DeviceInjector(Plugin):
    """Adjusts containers when they are created."""

    def CreateContainer(self, request: nri_pb2.CreateContainerRequest) -> nri_pb2.CreateContainerResponse:
        """Add the devices. An invalid annotation fails the creation with this error."""
        answer = nri_pb2.CreateContainerResponse()
        annotations, name = request.pod.annotations, request.container.name
        given = annotations.get(f"{KEY}/container.{name}", annotations.get(f"{KEY}/pod", ""))
        for device in yaml.safe_load(given) or [] if given else []:
            try:
                added = answer.adjust.linux.devices.add(
                    path=device["path"], type=device["type"], major=device["major"], minor=device["minor"]
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"annotation {KEY}: {device!r} is no device: {error}") from error
            for field in ("file_mode", "uid", "gid"):
                if field in device:
                    getattr(added, field).value = device[field]
            rule = answer.adjust.linux.resources.devices.add(allow=True, type=added.type, access="rwm")
            rule.major.value, rule.minor.value = added.major, added.minor
        return answer


if __name__ == "__main__":
    DeviceInjector("device-injector", "10").run()
