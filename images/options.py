"""The ``[images]`` table of the configuration."""

from __future__ import annotations

from typing import Literal

import msgspec

GIBIBYTE = 1 << 30
_NO_PROJECT = (1 << 32) - 1


class ImageOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How images are fetched, unpacked and kept.

    Registries: ``registry_config_dir`` holds one folder per registry host with a ``hosts.toml`` in containerd's form,
    read on each pull; ``insecure_registries`` are hosts (``host`` or ``host:port``) asked over plain http, as loopback
    addresses always are. ``connect_seconds`` is the maximum time of one connection attempt, ``stall_seconds`` that
    without data in a running transfer. Both together limit the wait for an answer and its headers. ``attempts`` is how
    often a request is tried that fails for a temporary reason. A pull that gets less than ``slowest_bytes_per_second``
    over ``slow_seconds`` of waiting for the network fails; 0 allows any rate.

    Credentials that come with a pull are used first. ``credentials_file`` holds the node's own, in the form of docker's
    ``config.json``; a credential helper it names gets ``credential_helper_seconds`` to answer.

    Layers: at most ``max_parallel_downloads`` of them are fetched and unpacked at once, over all pulls; beyond them a
    pull that has none gets one, up to 32 in all. A layer with more than ``max_layer_bytes`` unpacked or more than
    ``max_layer_entries`` is refused. So is one that takes more than ``max_layer_seconds`` of processor time, or delays
    its bytes for twice as long. So are an image whose layers take more than ``max_image_bytes``, compressed or
    unpacked, and a compressed archive that unpacks to more than ``max_archive_bytes``. With ``keep_blobs`` the
    compressed layers stay on disk beside the unpacked ones: checking, repairing and exporting an image need them. The
    fetched bytes of an interrupted pull then stay for ``partial_hours``, so that another pull continues from there.

    Every program in ``verifier_dir`` is asked before an image is pulled, in containerd's way, and has
    ``verifier_seconds`` to allow it; empty: none is asked. Imported archives are not verified.

    Where the data folder's file system has project quotas, ``project_quotas`` says whose writable layers they count:
    those of containers in user namespaces, which cannot leave their project, of all, or none (``off``). Each gets its
    own id from the first to the last of ``project_ids``.

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
    keep_blobs: bool = True
    partial_hours: float = 24.0
    verifier_dir: str = ""
    verifier_seconds: float = 10.0
    project_quotas: Literal["off", "user-namespaces", "all"] = "user-namespaces"
    project_ids: tuple[int, int] = (0x60000000, 0x600FFFFF)
    pinned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        first, last = self.project_ids
        if not 0 < first <= last < _NO_PROJECT:
            raise ValueError("project_ids are the first and the last of a range within 1 and 4294967294")
