"""Random and damaged input for everything that reads untrusted data: only the reader's own errors may be raised."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cri.services.image_service import to_message
from host.errors import PodkeelError
from host.files.mounts import parse_mount_table
from images.image import Image, read_config
from images.oci.manifests import check_is_image, parse_manifest
from images.oci.reference import parse as parse_reference
from images.options import ImageOptions
from images.registry.hosts import hosts_for
from images.registry.tokens import parse_challenges, read_token
from images.unpack.tar.headers import LimitError, TarError
from images.unpack.tar.reader import Stream, TarReader
from network.cni import configuration, result
from runtime.layout import Layout
from runtime.oci.conmon import Monitors
from tests.fuzz.tars import changed_tar
from tests.support.fuzz import changed, rounds, seconds

_DIGEST = "sha256:" + "a" * 64
_WORDS = ["schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size", "platform", "os", "urls"]
_WORDS += [
    "architecture",
    "variant",
    "annotations",
    "rootfs",
    "diff_ids",
    "Env",
    "User",
    "Volumes",
    "Entrypoint",
    "Labels",
]
_WORDS += [
    "cniVersion",
    "cniVersions",
    "ips",
    "address",
    "gateway",
    "interface",
    "interfaces",
    "name",
    "sandbox",
    "mac",
]
_WORDS += ["type", "plugins", "ipam", "disableCheck", "dns", "routes", "mtu", "Cmd", "StopSignal", "ExposedPorts"]
_VALUES = [
    "",
    "linux",
    "amd64",
    _DIGEST,
    "sha256:00",
    "10.0.0.2/24",
    "fd00::2/64",
    "10.0.0.1",
    "eth0",
    "veth1",
    "1.0.0",
]
_VALUES += [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "0",
    "ö",
    "\0",
    "bridge",
]

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(_VALUES) | st.text(max_size=5)
_keys = st.sampled_from(_WORDS) | st.text(max_size=3)
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=6), max_leaves=30
)


def _broken(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """The seeds with some bytes changed, and random bytes."""
    one = st.builds(lambda seed, number: changed(random.Random(number), seed), st.sampled_from(seeds), st.integers(0))
    return one | st.binary(max_size=200)


def _encoded(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError):
        return b"{}"


def _objects(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """JSON objects with known and other members, or the seeds with some bytes changed."""
    return st.dictionaries(_keys, _json, max_size=8).map(_encoded) | _broken(*seeds)


def _fuzz(strategy: st.SearchStrategy[Any], target: Callable[[Any], object], usually: float = 1.5) -> None:
    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def once(value: Any) -> None:
        target(value)

    for _ in rounds(seconds(usually)):
        once()


_MANIFEST = msgspec.json.encode(
    {
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _DIGEST, "size": 2},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": _DIGEST, "size": 9}],
    }
)
_INDEX = msgspec.json.encode(
    {
        "schemaVersion": 2,
        "manifests": [{"digest": _DIGEST, "size": 2, "platform": {"os": "linux", "architecture": "arm64"}}],
    }
)
_CONFIG = msgspec.json.encode(
    {"os": "linux", "architecture": "amd64", "config": {"User": "0", "Env": ["A=b"]}, "rootfs": {"diff_ids": [_DIGEST]}}
)


def test_manifests() -> None:
    def read(content: bytes) -> None:
        try:
            manifest = parse_manifest(content, "image x", "application/vnd.oci.image.manifest.v1+json")
            if not manifest.is_index:
                check_is_image(manifest, "image x")
        except PodkeelError as error:
            assert error.message

    _fuzz(_objects(_MANIFEST, _INDEX), read)


def test_image_configs() -> None:
    def read(content: bytes) -> None:
        try:
            file = read_config(content, "image x")
        except PodkeelError as error:
            assert error.message
            return
        image = Image(file.digest, _DIGEST, (), (), 1, file.config, (), (), pinned=False)
        assert to_message(image).SerializeToString()

    _fuzz(_objects(_CONFIG) | st.dictionaries(st.just("config"), _json).map(_encoded), read)


def test_references_challenges_and_tokens() -> None:
    def read(text: str) -> None:
        parse_challenges([text])
        for parse in (parse_reference, lambda text: read_token(text.encode(errors="surrogatepass"))):
            try:
                parse(text)
            except PodkeelError as error:
                assert error.message

    seeds = st.sampled_from(
        ['Bearer realm="https://x/t",service="x",scope="a:b:c"', "docker.io/a/b:c@" + _DIGEST, '{"token":1}']
    )
    mixed = st.builds(
        lambda seed, number: changed(random.Random(number), seed.encode()).decode("latin-1"), seeds, st.integers(0)
    )
    _fuzz(mixed | st.text(max_size=40), read)


def test_mount_table() -> None:
    line = b"36 35 98:0 /mnt1 /mnt2\\040x rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n"

    def read(content: bytes) -> None:
        for entry in parse_mount_table(content):
            os.fsencode(entry.target)
        whole = list(parse_mount_table(line + content.replace(b"\n", b"") + b"\n" + line))
        assert [entry.target for entry in (whole[0], whole[-1])] == ["/mnt2 x"] * 2  # odd lines hide no valid ones

    _fuzz(_broken(line, line * 3, line.replace(b"/mnt2", b"/a\r\x0b\x85b")), read)


def test_cni_results_and_configurations(tmp_path: Path) -> None:
    told = b'{"interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"interface":0,"address":"10.0.0.2/24"}]}'
    configured = b'{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge","capabilities":{"portMappings":true}}]}'

    def read(content: bytes) -> None:
        for parse in (
            lambda: result.pod_interface("n", result.decode("bridge", content)),
            lambda: configuration.parse(content, tmp_path / "x.conflist"),
        ):
            try:
                parse()
            except PodkeelError as error:
                assert error.message

    _fuzz(_objects(told, configured), read)


def test_hosts_toml(tmp_path: Path) -> None:
    options = ImageOptions(registry_config_dir=str(tmp_path))
    (tmp_path / "example.org").mkdir()
    file = tmp_path / "example.org" / "hosts.toml"
    seed = b'server = "https://example.org"\n[host."https://mirror:5000/v2"]\ncapabilities = ["pull"]\nca = "a.pem"\n'
    seed += b'skip_verify = false\nclient = [["a", "b"]]\noverride_path = true\ndial_timeout = "1s"\n'
    seed += b'[host.x.header]\nX = ["y"]\n'

    def read(content: bytes) -> None:
        file.write_bytes(content)
        try:
            assert hosts_for("example.org", options)
        except PodkeelError as error:
            assert str(file) in error.message

    _fuzz(_broken(seed), read)


def test_tars() -> None:
    for seed in rounds(seconds(1.5)):
        content = changed_tar(random.Random(seed))
        pieces = iter([content[start : start + 700] for start in range(0, len(content), 700)])
        reader = TarReader(Stream(lambda size: next(pieces, b""), len, 1 << 20))  # noqa: B023 - used in this round
        try:
            for entry in reader:
                assert isinstance(entry.name, bytes)
        except (TarError, LimitError):
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {content.hex()}") from error


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_layers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.layer_writing", str(seconds(3)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout)  # shown by -rP
    assert int(done.stdout.split()[0]) > 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_command_lines(tmp_path: Path) -> None:
    """Processes that execute conmon's program with random arguments: only the container's conmon is found."""
    shell = os.path.realpath("/bin/sh")
    layout = Layout(tmp_path / "data", tmp_path / "run")
    monitors = Monitors(shell, layout)
    container_id = "0123456789abcdef" * 4
    bundle = str(layout.container(container_id).path)
    words = ["-b", "", "ö", "-c", "x" * 5000, "\n", bundle + "/", bundle[:-1], container_id, "\udcff", bundle + "x"]
    for seed in rounds(seconds(2)):
        generator = random.Random(seed)
        started = []
        try:
            for number in range(8):
                odd = [generator.choice(words) for _ in range(generator.randrange(12))]
                ours = ["-b", bundle] if number == 7 else []
                command = [shell, "-c", "read end", *ours, *odd]
                started.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            assert monitors.running() == {container_id: started[-1].pid}, seed
        finally:
            for process in started:
                process.kill()
                process.communicate()
