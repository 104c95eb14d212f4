"""The ``[images]`` table of the configuration."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

GIBIBYTE = 1 << 30
DEFAULT_POLICY = "/etc/podkeel/policy.json"
_NO_PROJECT = (1 << 32) - 1
_FREE = re.compile(r"(\d{1,3}(?:\.\d{1,3})?)%|(\d{1,15})(|[KMGT]iB)")
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def free_bytes(text: str, total: int) -> int:
    """The bytes that ``text`` means on a disk of ``total`` bytes: ``5%``, ``10GiB``, or bytes without a unit.

    Raises ValueError for another form.
    """
    match = _FREE.fullmatch(text)
    if match is None or float(match[1] or 0) > 100:
        raise ValueError(f"{text!r} is neither a percentage of the disk like 5% nor a size like 10GiB")
    return int(total * float(match[1]) / 100) if match[1] else int(match[2]) * _UNITS[match[3]]


class ImageOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How images are fetched, unpacked and kept.

    Registries: ``registry_config_dir`` holds one folder per registry host with a ``hosts.toml`` in containerd's format,
    read on each pull. ``insecure_registries`` are hosts (``host`` or ``host:port``) reached over plain HTTP, as
    loopback addresses always are. ``connect_seconds`` is the maximum time of one connection attempt, ``stall_seconds``
    that without data in a running transfer. Their sum limits the wait for an answer and its headers. ``attempts`` is
    how often a request is tried that fails for a temporary reason. A pull fails if it receives less than
    ``slowest_bytes_per_second`` over ``slow_seconds`` of waiting for the network; 0 allows any rate.

    Credentials in the pull request are used first. ``credentials_file`` holds the node's own, in the format of docker's
    ``config.json``. A credential helper that it names must answer within ``credential_helper_seconds``.

    Layers: at most ``max_parallel_downloads`` are fetched and unpacked at the same time, over all pulls. A pull without
    any gets one more, up to 32 in all. A layer is refused if it has more than ``max_layer_bytes`` unpacked or more than
    ``max_layer_entries``. It is also refused if unpacking takes more than ``max_layer_seconds`` of processor time, or
    if the unpack worker makes its pull wait twice as long. An image is refused if its layers have more than
    ``max_image_bytes``, compressed or unpacked, and a compressed archive if it unpacks to more than
    ``max_archive_bytes``.

    A pull is refused if it cannot fit on the disk, and ended as soon as less than ``min_free`` of it is free: a
    percentage (``5%``) or a size (``10GiB``).

    With ``keep_blobs`` the compressed layers stay on disk beside the unpacked ones: checking, repairing and exporting
    an image need them. The fetched bytes of an interrupted pull then stay for ``partial_hours``, and the next pull
    continues from them. With ``partial_pulls`` a layer in the format zstd:chunked or eStargz is put together from kept
    layers of the same registry, and only the rest of it is fetched.

    Every program in ``verifier_dir`` must allow an image before it is pulled, in containerd's protocol, and must answer
    within ``verifier_seconds``. Empty: no program is asked. Imported archives are never verified.

    ``signature_policy`` is the file that says which signatures an image needs (containers-policy.json(5)),
    ``registries_dir`` the folder that says where signatures are (containers-registries.d(5)). There is no policy if the
    first is empty, or if it is the default and does not exist. Bundles of cosign 3 do not name the image that they
    sign: ``accept_unnamed_signatures`` accepts them for any name.

    ``project_quotas`` selects whose writable layers are counted by project quotas, if the data folder's file system has
    them: those of containers in user namespaces, which cannot leave their project; of all; or of none (``off``). Each
    writable layer gets its own id from the first to the last of ``project_ids``.

    ``pinned`` are patterns (``*`` and ``?``) of image names that garbage collection must keep, matched against the full
    form (``registry.k8s.io/pause:*``).
    """

    registry_config_dir: str = "/etc/podkeel/certs.d"
    insecure_registries: tuple[str, ...] = ()
    connect_seconds: float = 10.0
    stall_seconds: float = 60.0
    attempts: int = 4
    slowest_bytes_per_second: int = 1024
    slow_seconds: float = 60.0
    credentials_file: str = "/etc/podkeel/credentials.json"
    credential_helper_seconds: float = 10.0
    max_parallel_downloads: int = 4
    max_layer_bytes: int = 64 * GIBIBYTE
    max_layer_entries: int = 2_000_000
    max_layer_seconds: int = 1800
    max_image_bytes: int = 256 * GIBIBYTE
    max_archive_bytes: int = 256 * GIBIBYTE
    min_free: str = "1%"
    keep_blobs: bool = True
    partial_hours: float = 24.0
    partial_pulls: bool = True
    verifier_dir: str = ""
    verifier_seconds: float = 10.0
    signature_policy: str = DEFAULT_POLICY
    registries_dir: str = "/etc/containers/registries.d"
    accept_unnamed_signatures: bool = False
    project_quotas: Literal["off", "user-namespaces", "all"] = "user-namespaces"
    project_ids: tuple[int, int] = (0x60000000, 0x600FFFFF)
    pinned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            free_bytes(self.min_free, 0)
        except ValueError as error:
            raise ValueError(f"min_free: {error}") from None
        first, last = self.project_ids
        if not 0 < first <= last < _NO_PROJECT:
            raise ValueError("project_ids are the first and the last of a range within 1 and 4294967294")
