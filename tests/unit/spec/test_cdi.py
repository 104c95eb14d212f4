"""CDI descriptions and what they change in a spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from host.errors import InvalidArgumentError, UnsupportedError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.builder import ContainerSpec, build
from tests.unit.spec.requests import container, request

YAML = """
cdiVersion: "0.6.0"
kind: vendor.com/gpu
containerEdits:
  env: ["DRIVER=1", "PATH=/gpu/bin"]
  additionalGids: [44, 0]
devices:
  - name: "0"
    containerEdits:
      env: ["GPU=0"]
      deviceNodes:
        - {path: /dev/gpu0, hostPath: /dev/null, permissions: rw}
        - {path: /dev/gpu-made, type: c, major: 195, minor: 7, fileMode: 438, uid: 5, gid: 6}
      mounts:
        - {hostPath: /usr/lib/gpu, containerPath: /usr/lib/gpu, options: [ro, nosuid]}
      hooks:
        - {hookName: createContainer, path: /usr/bin/hook, args: [hook, ldcache], timeout: 5}
  - name: "1"
    containerEdits: {env: ["GPU=1"]}
"""


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for name in ("etc", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "etc/vendor.yaml").write_text(YAML)
    return [tmp_path / "etc", tmp_path / "run", tmp_path / "missing"]


def _describe(folder: Path, name: str, **edits: Any) -> None:
    device = {"name": name, "containerEdits": edits}
    described = {"cdiVersion": "0.6.0", "kind": "vendor.com/nic", "devices": [device]}
    (folder / f"{len(list(folder.iterdir()))}.json").write_text(json.dumps(described))


def _build(tmp_path: Path, folders: list[Path], *names: str, **fields: Any) -> ContainerSpec:
    config = container(CDI_devices=[cri_pb2.CDIDevice(name=name) for name in names], **fields)
    return build(request(tmp_path, config=config, cdi_folders=folders))


def test_edits(tmp_path: Path, folders: list[Path]) -> None:
    built = _build(tmp_path, folders, "vendor.com/gpu=0", "vendor.com/gpu=1", "vendor.com/gpu=0")
    document = json.loads(built.config_json)
    environment = document["process"]["env"]
    assert environment[-3:] == ["DRIVER=1", "PATH=/gpu/bin", "GPU=1"]
    assert len([entry for entry in environment if entry.startswith("PATH=")]) == 1
    assert document["process"]["user"]["additionalGids"] == [0, 10, 50, 44]
    assert list(built.user.supplemental_groups) == [0, 10, 50, 44]
    assert document["linux"]["devices"][0] | {"fileMode": 0} == {
        "path": "/dev/gpu0",
        "type": "c",
        "major": 1,
        "minor": 3,
        "fileMode": 0,
    }
    assert document["linux"]["devices"][1] == {
        "path": "/dev/gpu-made",
        "type": "c",
        "major": 195,
        "minor": 7,
        "fileMode": 0o666,
        "uid": 5,
        "gid": 6,
    }
    assert document["linux"]["resources"]["devices"][1:] == [
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"},
        {"allow": True, "type": "c", "major": 195, "minor": 7, "access": "rwm"},
    ]
    [mount] = [mount for mount in document["mounts"] if mount["destination"] == "/usr/lib/gpu"]
    assert (mount["type"], mount["options"]) == ("bind", ["rbind", "ro", "nosuid"])
    hook = {"path": "/usr/bin/hook", "args": ["hook", "ldcache"], "timeout": 5}
    assert document["hooks"] == {"createContainer": [hook]}


def test_annotations_ask_too(tmp_path: Path, folders: list[Path]) -> None:
    config = container(annotations={"cdi.k8s.io/plugin_x": "vendor.com/gpu=1", "other": "vendor.com/gpu=9"})
    built = build(request(tmp_path, config=config, cdi_folders=folders))
    assert "GPU=1" in built.spec.process.env


def test_a_container_without_cdi_has_no_hooks(tmp_path: Path, folders: list[Path]) -> None:
    assert "hooks" not in json.loads(_build(tmp_path, folders).config_json)


def test_a_later_folder_goes_first_and_changes_are_seen(tmp_path: Path, folders: list[Path]) -> None:
    _describe(folders[0], "a", env=["FROM=etc"])
    assert "FROM=etc" in _build(tmp_path, folders, "vendor.com/nic=a").spec.process.env
    _describe(folders[1], "a", env=["FROM=run"])
    assert "FROM=run" in _build(tmp_path, folders, "vendor.com/nic=a").spec.process.env


def test_files_that_are_wrong_concern_only_their_devices(tmp_path: Path, folders: list[Path]) -> None:
    (folders[0] / "bad.json").write_text("{")
    (folders[0] / "bad.yaml").write_text("a: [")
    (folders[0] / "ignored.txt").write_text("{")
    _describe(folders[0], "b", inventedEdit=1)
    assert "GPU=1" in _build(tmp_path, folders, "vendor.com/gpu=1").spec.process.env
    with pytest.raises(InvalidArgumentError, match=r"nic=b is not described .*bad\.json.*bad\.yaml.*"):
        _build(tmp_path, folders, "vendor.com/nic=b")


@pytest.mark.parametrize("name", ["gpu", "vendor.com/gpu", "vendor.com/gpu=", "vendor.com/gpu=a=b", "/gpu=0", ""])
def test_names_refused(tmp_path: Path, folders: list[Path], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not have the form"):
        _build(tmp_path, folders, name)


def test_two_descriptions_in_one_folder(tmp_path: Path, folders: list[Path]) -> None:
    _describe(folders[0], "twice", env=["A=1"])
    _describe(folders[0], "twice", env=["A=2"])
    with pytest.raises(InvalidArgumentError, match="more than one file"):
        _build(tmp_path, folders, "vendor.com/nic=twice")


@pytest.mark.parametrize(
    ("edits", "error", "reason"),
    [
        ({"intelRdt": {"closID": "x"}}, UnsupportedError, "intelRdt"),
        ({"netDevices": [{"hostInterfaceName": "x", "name": "y"}]}, UnsupportedError, "netDevices"),
        ({"deviceNodes": [{"path": "/dev/none-such"}]}, InvalidArgumentError, "No such file"),
        ({"deviceNodes": [{"path": "dev/x", "hostPath": "/dev/null"}]}, InvalidArgumentError, "not absolute"),
        ({"deviceNodes": [{"path": "/etc/passwd"}]}, InvalidArgumentError, "is not a device"),
        ({"deviceNodes": [{"path": "/dev/null", "permissions": "x"}]}, InvalidArgumentError, "permissions"),
        ({"hooks": [{"hookName": "poststop", "path": "hook"}]}, InvalidArgumentError, "absolute"),
        ({"mounts": [{"hostPath": "/a", "containerPath": "/../b"}]}, InvalidArgumentError, "without"),
    ],
)
def test_edits_refused(
    tmp_path: Path, folders: list[Path], edits: dict[str, Any], error: type[Exception], reason: str
) -> None:
    _describe(folders[0], "x", **edits)
    with pytest.raises(error, match=reason):
        _build(tmp_path, folders, "vendor.com/nic=x")
