"""The options of the Node Resource Interface (NRI)."""

from __future__ import annotations

from typing import Annotated

import msgspec

DEFAULT_SOCKET = "/var/run/nri/nri.sock"

Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]


class ValidatorOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The agent's own validator of what plugins change; it does nothing unless ``enabled``.

    ``reject_*`` refuse a container for which a plugin adds OCI hooks, changes the seccomp policy (by the kind of
    profile that the container would have otherwise), sets a namespace or a sysctl. ``required_plugins`` must have seen
    every container; the annotation ``required-plugins.noderesource.dev`` asks for more. Pods whose annotation
    ``tolerate_missing_annotation`` (empty: none) is ``true`` do not need them.
    """

    enabled: bool = False
    reject_oci_hooks: bool = False
    reject_runtime_default_seccomp: bool = False
    reject_unconfined_seccomp: bool = False
    reject_custom_seccomp: bool = False
    reject_namespaces: bool = False
    reject_sysctls: bool = False
    required_plugins: tuple[str, ...] = ()
    tolerate_missing_annotation: str = ""


class NriOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The Node Resource Interface: plugins on the node that observe and adjust containers.

    ``socket`` is where plugins connect, if ``external_connections`` allows it. Executables ``NN-name`` in
    ``plugin_dir`` are started by the agent, with the text of ``NN-name.conf`` or ``name.conf`` in ``config_dir``. A
    plugin has ``registration_seconds`` each to register, to be configured and to be synchronised, and
    ``request_seconds`` to answer an event. ``blockio_config_file`` has the classes of block I/O that plugins may give
    to containers.
    """

    enabled: bool = True
    socket: str = DEFAULT_SOCKET
    external_connections: bool = True
    plugin_dir: str = "/opt/nri/plugins"
    config_dir: str = "/etc/nri/conf.d"
    blockio_config_file: str = ""
    registration_seconds: Seconds = 5.0
    request_seconds: Seconds = 2.0
    default_validator: ValidatorOptions = ValidatorOptions()
