"""The files that a kubelet has ready before it makes a container."""

from __future__ import annotations

from pathlib import Path

from proto.runtime.v1 import cri_pb2

_SERVICE_ACCOUNT = {"ca.crt": "certificate\n", "namespace": "default\n", "token": "secret\n"}


def prepare(config: cri_pb2.ContainerConfig, kubelet: Path) -> None:
    """Make the host paths of all mounts below kubelet's folder: volumes as folders, the rest as files."""
    for mount in config.mounts:
        path = Path(mount.host_path)
        if not path.is_relative_to(kubelet) or path.exists():
            continue
        relative = str(path.relative_to(kubelet))
        if "/volumes/" in relative or "/volume-subpaths/" in relative:
            path.mkdir(parents=True)
            contents = {"index.html": "hello\n"} if "configmap" in relative else {}
            for name, text in (_SERVICE_ACCOUNT if "projected" in relative else contents).items():
                (path / name).write_text(text)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("127.0.0.1\tlocalhost\n" if path.name == "etc-hosts" else "")
