"""Mounts: what is asked for, what is refused, and the order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from host.errors import InvalidArgumentError, KubeletReasonError
from proto.runtime.v1 import cri_pb2
from runtime.specgen import config as oci
from runtime.specgen.builder import build
from runtime.specgen.facts import HandlerFacts, SandboxFiles
from runtime.specgen.mounts.configured import configured_mounts, container_path, in_order, root_propagation
from runtime.specgen.mounts.defaults import kernel_mounts
from runtime.specgen.mounts.host_paths import HostPaths
from runtime.specgen.mounts.idmapped import mapped_volume
from runtime.specgen.mounts.kernel_places import refuse_nested
from runtime.specgen.namespaces import NamespacePaths
from tests.unit.spec.requests import HANDLER, NODE, Image, container, privileged_sandbox, request, secured

_MAPPING = [cri_pb2.IDMapping(host_id=65536, container_id=0, length=65536)]


def _configured(*mounts: cri_pb2.Mount, handler: HandlerFacts = HANDLER, images: Any = None) -> list[oci.Mount]:
    return configured_mounts(mounts, images or {}, HostPaths(), handler, NODE, mapped_folder=Path("/bundle/mapped"))[0]


@pytest.mark.parametrize(
    ("given", "expected"), [("/a", "/a"), ("/a//b/./c/", "/a/b/c"), ("//a", "/a"), ("/a..b/...", "/a..b/...")]
)
def test_container_path(given: str, expected: str) -> None:
    assert container_path(given, "field") == expected


@pytest.mark.parametrize("given", ["", "a", "./a", "/", "//", "/.", "/a/../b", "/..", "/a\0b"])
def test_container_path_refused(given: str) -> None:
    with pytest.raises(InvalidArgumentError, match="field"):
        container_path(given, "field")


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, ["rbind", "rprivate", "rw"]),
        ({"readonly": True}, ["rbind", "rprivate", "ro"]),
        ({"readonly": True, "recursive_read_only": True}, ["rbind", "rprivate", "rro"]),
        ({"mount_options": ["nosuid", "noexec", "nosuid"]}, ["rbind", "rprivate", "rw", "noexec", "nosuid"]),
    ],
)
def test_options(tmp_path: Path, fields: dict[str, Any], options: list[str]) -> None:
    [mount] = _configured(cri_pb2.Mount(container_path="/v", host_path=str(tmp_path), **fields))
    assert (mount.destination, mount.type, mount.source, mount.options) == ("/v", "bind", str(tmp_path), options)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"container_path": "v"}, "'v' is not absolute"),
        ({"container_path": ""}, "not absolute"),
        ({"host_path": "relative"}, "'relative' is not absolute"),
        ({"host_path": ""}, "not absolute"),
        ({"recursive_read_only": True}, "needs readonly"),
        (
            {"recursive_read_only": True, "readonly": True, "propagation": "PROPAGATION_HOST_TO_CONTAINER"},
            "needs private propagation",
        ),
        ({"mount_options": ["suid"]}, "'suid' is not allowed"),
        ({"mount_options": ["bind,nosuid"]}, "is not allowed"),
        ({"propagation": 17}, "17 is unknown"),
        ({"image": {"image": "x"}}, "no host_path"),
        ({"image": {"image": "x"}, "host_path": ""}, "read-only"),
        ({"image": {"image": "x"}, "host_path": "", "readonly": True, "image_sub_path": "../x"}, "without '..'"),
        ({"uidMappings": _MAPPING}, "belong together"),
        (
            {"uidMappings": _MAPPING, "gidMappings": _MAPPING * 2},
            "gidMappings: container ids 0 and up are mapped twice",
        ),
    ],
)
def test_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    values = {"container_path": "/v", "host_path": str(tmp_path), **fields}
    with pytest.raises(InvalidArgumentError, match=reason):
        _configured(cri_pb2.Mount(**values), images={0: tmp_path})


def test_what_the_handler_cannot_do(tmp_path: Path) -> None:
    plain = HandlerFacts("plain")
    wanted = cri_pb2.Mount(container_path="/v", host_path=str(tmp_path), readonly=True, recursive_read_only=True)
    with pytest.raises(KubeletReasonError, match="handler 'plain'") as unable:
        _configured(wanted, handler=plain)
    assert unable.value.reason == "RROUnsupported"


def test_volumes_with_mapped_ids_are_bound_by_the_agent(tmp_path: Path) -> None:
    plain = cri_pb2.Mount(container_path="/u", host_path=str(tmp_path))
    mapped = cri_pb2.Mount(
        container_path="/v", host_path=str(tmp_path), readonly=True, uidMappings=_MAPPING, gidMappings=_MAPPING
    )
    folder = Path("/bundle/mapped")
    mounts, volumes = configured_mounts([plain, mapped], {}, HostPaths(), HANDLER, NODE, mapped_folder=folder)
    assert [(mount.source, mount.uid_mappings) for mount in mounts] == [(str(tmp_path), []), ("/bundle/mapped/1", [])]
    assert mounts[1].options == ["rbind", "rprivate", "ro"]
    [volume] = volumes
    assert (volume.source, volume.target, volume.follows_host) == (str(tmp_path), folder / "1", False)
    assert [(m.container_id, m.host_id, m.size) for m in volume.uids] == [(0, 65536, 65536)]


def test_volumes_with_mapped_ids_pass_no_mounts_to_the_host(tmp_path: Path) -> None:
    mount = cri_pb2.Mount(container_path="/v", uidMappings=_MAPPING, gidMappings=_MAPPING)
    mount.propagation = cri_pb2.MountPropagation.PROPAGATION_HOST_TO_CONTAINER
    followed = mapped_volume(mount, "/source", Path("/target"))
    assert followed is not None
    assert followed.follows_host
    mount.propagation = cri_pb2.MountPropagation.PROPAGATION_BIDIRECTIONAL
    with pytest.raises(InvalidArgumentError, match="cannot be bidirectional"):
        mapped_volume(mount, "/source", Path("/target"))


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    paths = HostPaths()
    assert paths.resolve(str(tmp_path / "link")) == str(tmp_path / "real")
    assert paths.resolve(str(tmp_path / "link/new/folder")) == str(tmp_path / "real/new/folder")
    assert not (tmp_path / "real/new").exists()
    paths.make()
    assert (tmp_path / "real/new/folder").is_dir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name in ("dangling", "loop", "file/below"):
        with pytest.raises(InvalidArgumentError, match=name):
            paths.resolve(str(tmp_path / name))


def test_image_mounts(tmp_path: Path) -> None:
    (tmp_path / "sub/dir").mkdir(parents=True)
    (tmp_path / "sub/out").symlink_to("/etc")
    image = cri_pb2.ImageSpec(image="models:1")
    plain = cri_pb2.Mount(container_path="/m", image=image, readonly=True)
    below = cri_pb2.Mount(container_path="/m", image=image, readonly=True, image_sub_path="sub/dir")
    out = cri_pb2.Mount(container_path="/m", image=image, readonly=True, image_sub_path="sub/out")
    assert _configured(plain, images={0: tmp_path})[0].source == str(tmp_path)
    assert _configured(below, images={0: tmp_path})[0].source == str(tmp_path / "sub/dir")
    for mount, images in ((out, {0: tmp_path}), (plain, {})):
        with pytest.raises(KubeletReasonError) as failed:
            _configured(mount, images=images)
        assert failed.value.reason == "ImageVolumeMountFailed"


def test_order_and_precedence() -> None:
    defaults = [oci.Mount(destination=path) for path in ("/proc", "/dev", "/dev/pts", "/dev/shm", "/sys", "/etc/hosts")]
    given = [oci.Mount(destination=path, source="x") for path in ("/a/b/c", "/b", "/a", "/a/b", "/etc/hosts", "/a")]
    ordered = [(mount.destination, mount.source) for mount in in_order(defaults, given)]
    assert ordered == [
        ("/proc", ""),
        ("/dev", ""),
        ("/sys", ""),
        ("/b", "x"),
        ("/a", "x"),
        ("/a", "x"),
        ("/dev/pts", ""),
        ("/dev/shm", ""),
        ("/a/b", "x"),
        ("/etc/hosts", "x"),
        ("/a/b/c", "x"),
    ]


def test_a_mount_at_dev_takes_over_all_of_it() -> None:
    defaults = [oci.Mount(destination=path) for path in ("/dev", "/dev/pts", "/developer", "/sys", "/sys/fs/cgroup")]
    given = [oci.Mount(destination="/dev", source="x"), oci.Mount(destination="/sys", source="x")]
    assert [(mount.destination, mount.source) for mount in in_order(defaults, given)] == [
        ("/developer", ""),
        ("/dev", "x"),
        ("/sys", "x"),
        ("/sys/fs/cgroup", ""),
    ]


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ([], ""),
        (["PRIVATE"], ""),
        (["PRIVATE", "HOST_TO_CONTAINER"], "rslave"),
        (["BIDIRECTIONAL", "HOST_TO_CONTAINER"], "shared"),
    ],
)
def test_root_propagation(modes: list[str], expected: str) -> None:
    assert root_propagation([cri_pb2.Mount(propagation=f"PROPAGATION_{mode}") for mode in modes]) == expected


@pytest.mark.parametrize("privileged", [False, True])
def test_kernel_mounts(privileged: bool) -> None:
    mounts = {
        m.destination: m for m in kernel_mounts(NamespacePaths(network="/n"), privileged=privileged, gid_mappings=[])
    }
    assert ("rw" if privileged else "ro") in mounts["/sys"].options
    assert ("rw" if privileged else "ro") in mounts["/sys/fs/cgroup"].options
    assert "gid=5" in mounts["/dev/pts"].options


def test_kernel_mounts_in_a_user_namespace() -> None:
    few = [oci.IDMapping(container_id=0, host_id=1000, size=1)]
    paths = NamespacePaths(user="/u", host_pid=True)
    mounts = {m.destination: m for m in kernel_mounts(paths, privileged=False, gid_mappings=few)}
    assert [mounts[path].type for path in ("/proc", "/sys", "/dev/mqueue")] == ["bind"] * 3
    assert "gid=5" not in mounts["/dev/pts"].options
    own = NamespacePaths(user="/u", network="/n", ipc="/i")
    mounts = {m.destination: m for m in kernel_mounts(own, privileged=False, gid_mappings=few)}
    assert [mounts[path].type for path in ("/proc", "/sys", "/dev/mqueue")] == ["proc", "sysfs", "mqueue"]


def test_pod_files_and_volumes(tmp_path: Path) -> None:
    (tmp_path / "hosts").touch()
    files = SandboxFiles(Path("/p/resolv.conf"), Path("/p/hosts"), Path("/p/hostname"), Path("/p/shm"))
    config = secured(readonly_rootfs=True)
    config.mounts.append(cri_pb2.Mount(container_path="/etc//hosts", host_path=str(tmp_path / "hosts")))
    config.mounts.append(cri_pb2.Mount(container_path="/data", host_path=str(tmp_path)))
    image = Image(volumes=["/data/", "cache", "/cache"])
    built = build(request(tmp_path, config=config, files=files, image=image))
    by_path = {mount.destination: mount for mount in built.spec.mounts}
    assert by_path["/etc/hosts"].source == str(tmp_path / "hosts")
    assert by_path["/etc/resolv.conf"].options == ["bind", "nosuid", "nodev", "noexec", "ro"]
    assert by_path["/dev/shm"].options == ["bind", "nosuid", "nodev", "noexec"]
    assert by_path["/data"].source == str(tmp_path)
    [volume] = built.volumes
    assert (volume.container_path, volume.folder.parent) == ("/cache", tmp_path / "container/volumes")
    assert by_path["/cache"].source == str(volume.folder)
    assert not volume.folder.exists()


@pytest.mark.parametrize(
    "path", ["/", "/../etc", "proc", "//proc/self/attr", "top", "up", "far/attr", "chain", "round"]
)
def test_image_volumes_refused(tmp_path: Path, path: str) -> None:
    wanted = request(tmp_path, image=Image(volumes=[path]))
    links = {"top": "/", "up": "a/../../..", "far": "../proc/self", "chain": "far", "round": "round"}
    for name, target in links.items():
        (wanted.rootfs / name).symlink_to(target)
    with pytest.raises(InvalidArgumentError, match=r"VOLUME|too many links"):
        build(wanted)


def test_image_volumes_behind_links(tmp_path: Path) -> None:
    wanted = request(tmp_path, image=Image(volumes=["/link/data", "/processes"]))
    (wanted.rootfs / "link").symlink_to("/srv/../proc/../var")
    assert [volume.container_path for volume in build(wanted).volumes] == ["/link/data", "/processes"]


def test_nothing_is_made_when_something_later_is_wrong(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    mounts = [cri_pb2.Mount(container_path="/m", host_path=str(missing))]
    for extra in ({"mounts": [*mounts, cri_pb2.Mount(container_path="rel", host_path="/")]}, {"working_dir": "rel"}):
        config = container(**{"mounts": mounts, **extra})
        with pytest.raises(InvalidArgumentError, match="container 'app' of pod default/pod: "):
            build(request(tmp_path, config=config))
        assert not missing.exists()
    build(request(tmp_path, config=container(mounts=mounts), sandbox=privileged_sandbox()))
    assert missing.is_dir()


def test_shared_memory_of_the_node(tmp_path: Path) -> None:
    def shm(**fields: Any) -> list[tuple[str, list[str]]]:
        built = build(request(tmp_path, **fields))
        return [(m.source, m.options) for m in built.spec.mounts if m.destination == "/dev/shm"]

    assert shm(namespaces=NamespacePaths()) == [("/dev/shm", ["bind", "nosuid", "nodev"])]
    assert shm(namespaces=NamespacePaths(ipc="/i")) == []


def test_reasons_for_kubelet_name_the_container(tmp_path: Path) -> None:
    mount = cri_pb2.Mount(container_path="/v", host_path="/", readonly=True, recursive_read_only=True)
    with pytest.raises(KubeletReasonError) as failed:
        build(request(tmp_path, config=container(mounts=[mount]), handler=HandlerFacts("plain")))
    assert failed.value.message.startswith("RROUnsupported: container 'app' of pod default/pod: mount /v ")


def bound(destination: str, source: Path | str) -> oci.Mount:
    return oci.Mount(destination=destination, type="bind", source=str(source))


def test_kernel_folders_come_last_with_a_volume_inside_another(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    volumes = [
        cri_pb2.Mount(container_path=path, host_path=str(tmp_path))
        for path in ("/volume/inner", "/dev/termination-log", "/volume", "/device")
    ]
    (tmp_path / "inner").mkdir()
    plain = build(request(tmp_path, config=container(mounts=volumes[1:])))
    assert [mount.destination for mount in plain.spec.mounts][:2] == ["/proc", "/dev"]
    built = build(request(tmp_path, config=container(mounts=volumes)))
    destinations = [mount.destination for mount in built.spec.mounts]
    assert destinations[:2] == ["/volume", "/device"]
    assert destinations.index("/volume/inner") < destinations.index("/proc")
    assert destinations.index("/proc") < destinations.index("/dev") < destinations.index("/dev/termination-log")
    assert sorted(destinations) == sorted([*(mount.destination for mount in plain.spec.mounts), "/volume/inner"])


def test_volumes_in_volumes_that_no_order_makes_safe_are_refused(tmp_path: Path) -> None:
    shm = [bound("/dev/shm", tmp_path), bound("/dev/shm/inner", tmp_path)]
    refuse_nested(["/dev/shm/inner"], shm, sees_others=False)
    with pytest.raises(InvalidArgumentError, match="/dev/shm/inner is in the volume at /dev/shm"):
        refuse_nested(["/dev/shm/inner"], shm, sees_others=True)
    refuse_nested(["/dev/shm"], [bound("/dev", "/dev"), bound("/dev/shm", tmp_path)], sees_others=True)
    with pytest.raises(InvalidArgumentError, match="/ has devices and would be mounted inside another volume, at /a/b"):
        refuse_nested(["/a/b"], [bound("/a", tmp_path), bound("/a/b", "/")], sees_others=False)
    refuse_nested(["/a/b"], [bound("/a", tmp_path), bound("/a/b", tmp_path)], sees_others=True)
