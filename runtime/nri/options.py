"""The options of the Node Resource Interface (NRI)."""

from __future__ import annotations

from typing import Annotated

import msgspec

DEFAULT_SOCKET = "/var/run/nri/nri.sock"

Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]


class ValidatorOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The agent's own validator of plugins' changes. It does nothing unless ``enabled``.

    ``reject_*`` refuse a container if a plugin adds OCI hooks, changes the seccomp policy, sets a namespace or sets a
    sysctl. For seccomp the option depends on the kind of profile that the container has without the change.
    ``required_plugins`` must have been called for every container. The annotation ``required-plugins.noderesource.dev``
    adds more. They are not required for pods whose annotation ``tolerate_missing_annotation`` (empty: none) is
    ``true``.
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

    Plugins connect to ``socket``, if ``external_connections`` allows it. The agent starts the executables ``NN-name``
    in ``plugin_dir``. Each gets the text of ``NN-name.conf`` or ``name.conf`` in ``config_dir`` as its configuration. A
    plugin has ``registration_seconds`` for each of: registration, configuration, synchronisation. It has
    ``request_seconds`` to answer an event. ``blockio_config_file`` has the classes of block I/O that plugins may set.
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
