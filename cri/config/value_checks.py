"""Checks of values beyond their types, so that an error names its line before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

_INTERFACE_NAME_BYTES = 15  # IFNAMSIZ less the final zero
_SOCKET_PATH_BYTES = 107  # sun_path of unix(7) less the final zero


def _networks(values: Sequence[str]) -> str:
    for value in values:
        try:
            ip_network(value)
        except ValueError as error:
            return f"expected address ranges such as 10.88.0.0/16 or fd00:88::/64: {error}"
    return ""


def _interface_name(value: str) -> str:
    good = (
        0 < len(value.encode()) <= _INTERFACE_NAME_BYTES
        and not set(value) & set("/ \t\n:")
        and value not in (".", "..")
    )
    return "" if good else f"expected a link name of 1 to {_INTERFACE_NAME_BYTES} bytes without blanks, got {value!r}"


def _one_of(*allowed: str) -> Callable[[Any], str]:
    return lambda value: "" if value in allowed else f"expected one of {', '.join(allowed)}, got {value!r}"


def _folder(value: str) -> str:
    return "" if value.startswith("/") else f"expected an absolute path, got {value!r}"


def _unix_socket(value: str) -> str:
    if not value.startswith("/") or len(value.encode()) > _SOCKET_PATH_BYTES:
        return f"expected an absolute path of at most {_SOCKET_PATH_BYTES} bytes, got {value!r}"
    return ""


def _folders(values: Sequence[str]) -> str:
    return next(filter(None, map(_folder, values)), "")


def _not_negative(value: float) -> str:
    return "" if value >= 0 else f"expected 0 or more, got {value}"


def _positive(value: float) -> str:
    return "" if value > 0 else f"expected more than 0, got {value}"


def _file_mode_mask(value: str) -> str:
    good = 0 < len(value) <= 4 and set(value) <= set("01234567") and int(value, 8) <= 0o777
    return "" if good else f"expected octal digits such as 0022, got {value!r}"


# Each check returns what is wrong with the value, or an empty text.
CHECKS: Mapping[tuple[str, ...], Callable[[Any], str]] = {
    ("runtime", "data_dir"): _folder,
    ("runtime", "run_dir"): _folder,
    ("runtime", "cgroup_driver"): _one_of("auto", "cgroupfs", "systemd"),
    ("runtime", "pids_limit"): _not_negative,
    ("runtime", "umask"): _file_mode_mask,
    ("runtime", "hooks_dirs"): _folders,
    ("network", "cni_config_dir"): _folder,
    ("network", "cni_bin_dirs"): _folders,
    ("network", "cni_timeout_seconds"): _positive,
    ("network", "bridge"): _interface_name,
    ("network", "pod_cidrs"): _networks,
    ("network", "cluster_cidrs"): _networks,
    ("network", "mtu"): _not_negative,
    ("checkpoint", "failure_log_dir"): lambda value: _folder(value) if value else "",
    ("checkpoint", "archive_dirs"): _folders,
    ("nri", "socket"): _unix_socket,
    ("nri", "plugin_dir"): _folder,
    ("nri", "config_dir"): _folder,
    ("nri", "blockio_config_file"): lambda value: _folder(value) if value else "",
}
