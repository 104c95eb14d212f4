"""Runs Debian's docker-registry on a loopback port for a test session."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

from tests.support.image_builder import OCI_MANIFEST, BuiltImage
from tests.support.ports import free_port


@dataclass(frozen=True)
class Registry:
    """A running registry. ``host`` is ``127.0.0.1:port``."""

    host: str
    folder: Path
    pid: int
    authorization: str = ""

    def _send(self, method: str, path: str, body: bytes = b"", **headers: str) -> str:
        connection = HTTPConnection(self.host, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.authorization:
            named["Authorization"] = self.authorization
        with contextlib.closing(connection):
            connection.request(method, path, body, named)
            response = connection.getresponse()
            text = response.read()
            assert response.status < 300, (method, path, response.status, text)
            return response.headers.get("Location", "")

    def push_blob(self, repository: str, digest: str, content: bytes) -> None:
        """Upload one blob."""
        location = self._send("POST", f"/v2/{repository}/blobs/uploads/")
        path = location.partition(self.host)[2] or location
        mark = "&" if "?" in path else "?"
        self._send("PUT", f"{path}{mark}digest={digest}", content, Content_Type="application/octet-stream")

    def push_manifest(self, repository: str, name: str, content: bytes, media_type: str) -> None:
        """Upload a manifest or index under a tag or digest."""
        self._send("PUT", f"/v2/{repository}/manifests/{name}", content, Content_Type=media_type)

    def push(self, image: BuiltImage, repository: str, tag: str = "latest") -> str:
        """Upload a whole image and return its reference."""
        blobs, manifest = image.blobs()
        for digest, blob in blobs.items():
            if blob != manifest:
                self.push_blob(repository, digest, blob)
        media_type = json.loads(manifest).get("mediaType", OCI_MANIFEST)
        self.push_manifest(repository, tag, manifest, media_type)
        return f"{self.host}/{repository}:{tag}"

    def blob_path(self, digest: str) -> Path:
        """The path of a blob in the registry's store, for tests that damage it."""
        name = digest.partition(":")[2]
        return self.folder / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


@contextlib.contextmanager
def run_registry(*, auth: str = "", authorization: str = "", prefix: tuple[str, ...] = ()) -> Iterator[Registry]:
    """Start a registry with an empty store. ``auth`` is the YAML of its ``auth`` section.

    ``prefix`` are the words before its command, which for example enter a namespace.
    """
    folder = Path(tempfile.mkdtemp(prefix="podkeel-registry-"))
    port = free_port()
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {folder}}}\n"
        f"  cache: {{blobdescriptor: inmemory}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n{auth}"
    )
    process = subprocess.Popen(
        [*prefix, "docker-registry", "serve", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
    )
    try:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if "listening on" in line:
                break
        else:
            raise AssertionError(f"docker-registry ended: {''.join(lines)}")
        with open(os.devnull, "w") as null:  # later log lines must not fill the pipe
            drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=null)
        try:
            yield Registry(f"127.0.0.1:{port}", folder, process.pid, authorization)
        finally:
            process.kill()
            process.wait()
            drain.wait()
            process.stderr.close()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(folder)
