"""The container's first process: its command, environment, working directory and limits."""

from __future__ import annotations

import posixpath
import re
import resource
from collections.abc import Iterable, Sequence
from typing import Protocol

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config
from runtime.specgen.mounts.container_paths import ContainerPaths, Place
from runtime.specgen.node_facts import NodeFacts

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_DESCRIPTOR_FOLDER = re.compile(
    r"/(dev/(fd|stdin|stdout|stderr)|proc/(self|thread-self|\d+)(/task/\d+)?/(fd|cwd|root))(/|$)"
)


class ImageConfig(Protocol):
    """The image's configuration for its containers (OCI image-spec, ``config``)."""

    @property
    def user(self) -> str:
        """``uid``, ``uid:gid``, ``name`` or ``name:group``; empty for root."""

    @property
    def env(self) -> Sequence[str]:
        """``NAME=value`` entries."""

    @property
    def entrypoint(self) -> Sequence[str]:
        """The fixed entry point."""

    @property
    def cmd(self) -> Sequence[str]:
        """Arguments, or the command if there is no entrypoint."""

    @property
    def working_dir(self) -> str:
        """Empty for ``/``."""

    @property
    def volumes(self) -> Iterable[str]:
        """Paths that get a separate writable folder."""

    @property
    def stop_signal(self) -> str:
        """Name or number; empty for SIGTERM."""


def command_line(config: cri_pb2.ContainerConfig, image: ImageConfig) -> list[str]:
    """The command line: ``command`` replaces ENTRYPOINT and drops CMD; ``args`` replaces CMD."""
    command, arguments = list(config.command), list(config.args)
    if not command:
        arguments = arguments or list(image.cmd or ())
        command = [] if list(image.entrypoint or ()) == [""] else list(image.entrypoint or ())
    line = command + arguments
    if not line or not line[0]:
        raise InvalidArgumentError(
            "there is no command: the image has neither ENTRYPOINT nor CMD, so set command or args"
        )
    for word in line:
        refuse_nul(word, "command and args")
    return line


def environment(config: cri_pb2.ContainerConfig, image: ImageConfig, *, hostname: str, home: str) -> list[str]:
    """The image's variables, replaced by the configuration's.

    PATH, HOSTNAME, TERM (tty) and HOME are set if missing.
    """
    variables = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if config.tty:
        variables["TERM"] = "xterm"
    for entry in image.env or ():
        name, equals, value = entry.partition("=")
        if name and equals:
            refuse_nul(entry, "the image's environment")
            variables[name] = value
    for given in config.envs:
        if not given.key or "=" in given.key:
            raise InvalidArgumentError(
                f"envs: {given.key!r} is not a variable's name: it must not be empty or hold '='"
            )
        try:
            value = given.value.decode()
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(
                f"envs: the value of {given.key} is not UTF-8: encode it, for example in base64"
            ) from error
        refuse_nul(given.key + value, f"envs: {given.key}")
        variables[given.key] = value
    if not variables.get("HOME"):
        variables["HOME"] = home
    return [f"{name}={value}" for name, value in variables.items()]


def working_directory(config: cri_pb2.ContainerConfig, image: ImageConfig) -> str:
    """The configuration's directory, else the image's, else ``/``. The OCI runtime creates it if it is missing.

    Folders of open descriptors are refused: a process could escape from its container through them.
    """
    if config.working_dir and not config.working_dir.startswith("/"):
        raise InvalidArgumentError(f"working_dir {config.working_dir!r} is relative: use an absolute path")
    folder = posixpath.normpath("/" + (config.working_dir or image.working_dir or "").lstrip("/"))
    refuse_nul(folder, "working_dir")
    if _DESCRIPTOR_FOLDER.match(folder):
        raise InvalidArgumentError(f"working_dir {folder!r} leads through a process's descriptors: give a plain folder")
    return folder


def settled_directory(folder: str, paths: ContainerPaths) -> Place:
    """Resolve ``folder``.

    Raises InvalidArgumentError, with the link, if a link leads into the kernel's file systems, where links of processes
    lead anywhere.
    """
    place = paths.resolve(folder)
    if place.link and place.of_kernel:
        raise InvalidArgumentError(
            f"working_dir {folder!r}: the link {place.link} leads to {place.path}: use an image without this link, "
            "or another working directory"
        )
    return place


def refuse_nul(text: str, field: str) -> None:
    """Raise InvalidArgumentError for a NUL byte: OCI runtimes would cut the text there."""
    if "\0" in text:
        raise InvalidArgumentError(f"{field} holds a NUL byte, which no process can be given: remove it")


def rlimits(configured: Sequence[config.Rlimit], node: NodeFacts) -> list[config.Rlimit]:
    """The node's defaults, replaced by the configured limits. Open files never exceed what the agent may set."""
    limits = {limit.type: limit for limit in node.default_rlimits}
    for limit in configured:
        if not limit.type.startswith("RLIMIT_") or not hasattr(resource, limit.type):
            raise InvalidArgumentError(f"{limit.type} is not a resource limit: see setrlimit(2) for the names")
        if limit.soft > limit.hard:
            raise InvalidArgumentError(f"{limit.type}: the soft limit {limit.soft} is above the hard one {limit.hard}")
        limits[limit.type] = limit
    files = limits.get("RLIMIT_NOFILE")
    if files is not None and files.hard > node.max_open_files:
        most = node.max_open_files
        limits["RLIMIT_NOFILE"] = config.Rlimit(type="RLIMIT_NOFILE", hard=most, soft=min(files.soft, most))
    return list(limits.values())
