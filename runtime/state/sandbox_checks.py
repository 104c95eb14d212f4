"""Checks the parts of a sandbox's configuration that can be invalid on any node."""

from __future__ import annotations

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.namespaces import user_mappings

NAME_LIMIT = 253
HOSTNAME_LIMIT = 64


def validate_sandbox(config: cri_pb2.PodSandboxConfig) -> None:
    """Raise InvalidArgumentError or UnsupportedError for a configuration that cannot work on any node."""
    metadata = config.metadata
    if not metadata.name:
        raise InvalidArgumentError("the sandbox configuration has no metadata with a name: set metadata.name")
    title = f"sandbox {metadata.namespace}/{metadata.name}"
    for field, value in (("name", metadata.name), ("namespace", metadata.namespace), ("uid", metadata.uid)):
        if len(value) > NAME_LIMIT:
            raise InvalidArgumentError(f"{title[:80]}…: metadata.{field} is over {NAME_LIMIT} characters: shorten it")
        if "\0" in value or "/" in value:
            raise InvalidArgumentError(f"{title}: metadata.{field} {value!r} holds a slash or NUL: remove it")
    if len(config.hostname) > HOSTNAME_LIMIT:
        raise InvalidArgumentError(f"{title}: hostname {config.hostname!r} is over {HOSTNAME_LIMIT} characters")
    if any(character in config.hostname for character in "\0\n/ "):
        raise InvalidArgumentError(f"{title}: hostname {config.hostname!r} holds a character no host name has")
    if config.log_directory and not config.log_directory.startswith("/"):
        raise InvalidArgumentError(f"{title}: log_directory {config.log_directory!r} must be an absolute path")
    options = config.linux.security_context.namespace_options
    if options.network not in (cri_pb2.POD, cri_pb2.NODE):
        raise InvalidArgumentError(f"{title}: the network namespace mode must be POD or NODE")
    if options.ipc not in (cri_pb2.POD, cri_pb2.NODE):
        raise InvalidArgumentError(f"{title}: the ipc namespace mode must be POD or NODE")
    if options.pid == cri_pb2.TARGET:
        raise InvalidArgumentError(f"{title}: pid mode TARGET is for containers only: use POD, CONTAINER or NODE")
    user_mappings(options)
