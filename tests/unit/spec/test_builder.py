"""The whole spec: its JSON, its annotations, its speed and the errors' wording."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2
from runtime.specgen.builder import build
from runtime.specgen.namespaces import NamespacePaths
from tests.unit.spec.requests import HANDLER, NODE, container, like_kubelets, request, sandbox, secured


def test_document(tmp_path: Path) -> None:
    built = build(like_kubelets(tmp_path))
    document = json.loads(built.config_json)
    assert document["ociVersion"] == "1.0.2"
    assert document["root"] == {"path": str(tmp_path / "rootfs")}
    process = document["process"]
    assert process["user"] == {"uid": 1000, "gid": 1000, "umask": 0o022, "additionalGids": [1000, 29, 50]}
    assert process["args"] == ["sh", "-c", "sleep 1000"]
    assert process["oomScoreAdj"] == 999
    assert process["rlimits"] == [{"type": "RLIMIT_NOFILE", "hard": 20000, "soft": 20000}]
    assert "inheritable" not in process["capabilities"]
    linux = document["linux"]
    assert linux["cgroupsPath"] == "/pod/c1"
    assert linux["resources"] == {
        "devices": [{"allow": False, "access": "rwm"}],
        "memory": {"limit": 1 << 25, "swap": 1 << 25},
        "cpu": {"shares": 102, "period": 100000},
        "pids": {"limit": 1000},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
    }
    assert linux["maskedPaths"] == ["/proc/asound", "/proc/acpi", "/proc/kcore"]
    assert linux["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert [mount["destination"] for mount in document["mounts"]] == [
        "/proc",
        "/dev",
        "/sys",
        "/dev/pts",
        "/dev/mqueue",
        "/dev/shm",
        "/etc/resolv.conf",
        "/etc/hostname",
        "/etc/hosts",
        "/dev/termination-log",
        "/sys/fs/cgroup",
        "/var/run/secrets/kubernetes.io/serviceaccount",
    ]
    assert (built.stop_signal.name, built.user.uid, list(built.user.supplemental_groups)) == (
        "SIGTERM",
        1000,
        [1000, 29, 50],
    )


def test_cgroup_namespace_on_version_two_only(tmp_path: Path) -> None:
    def kinds(**fields: object) -> set[str]:
        return {namespace.type for namespace in build(request(tmp_path, **fields)).spec.linux.namespaces}

    unified = replace(NODE, cgroup_version=2)
    privileged = sandbox(linux=cri_pb2.LinuxPodSandboxConfig(security_context={"privileged": True}))
    assert "cgroup" not in kinds()
    assert "cgroup" in kinds(node=unified)
    assert "cgroup" not in kinds(node=unified, config=secured(privileged=True), sandbox=privileged)


def test_user_namespace_mappings_only_when_joined(tmp_path: Path) -> None:
    mapping = [cri_pb2.IDMapping(host_id=65536, container_id=0, length=65536)]
    options = cri_pb2.NamespaceOption(userns_options={"mode": "POD", "uids": mapping, "gids": mapping})
    pod = sandbox(linux=cri_pb2.LinuxPodSandboxConfig(security_context={"namespace_options": options}))
    linux = build(request(tmp_path, sandbox=pod, namespaces=NamespacePaths(network="/n", user="/u"))).spec.linux
    assert [(m.container_id, m.host_id, m.size) for m in linux.uid_mappings + linux.gid_mappings] == [
        (0, 65536, 65536)
    ] * 2
    assert build(request(tmp_path)).spec.linux.uid_mappings == []


def test_annotations_are_ours_and_those_allowed(tmp_path: Path) -> None:
    config = container(annotations={"run.oci.keep_original_groups": "1", "vendor.io/a": "container"})
    config.annotations["io.kubernetes.cri.untrusted"] = "true"
    pod = sandbox(annotations={"vendor.io/a": "pod", "vendor.io/b": "pod", "other": "x"})
    handler = replace(HANDLER, allowed_annotations=("vendor.io/*", "run.oci.*", "io.kubernetes.*"))
    spec = build(request(tmp_path, config=config, sandbox=pod, handler=handler, sandbox_id="s1")).spec
    assert {key: value for key, value in spec.annotations.items() if not key.startswith("io.kubernetes.cri.")} == {
        "vendor.io/a": "container",
        "vendor.io/b": "pod",
    }
    assert spec.annotations["io.kubernetes.cri.sandbox-id"] == "s1"
    assert spec.annotations["io.kubernetes.cri.container-type"] == "container"
    assert "io.kubernetes.cri.untrusted" not in spec.annotations


def test_a_scope_gets_values_that_systemd_would_otherwise_choose(tmp_path: Path) -> None:
    def told(**fields: object) -> dict[str, str]:
        spec = build(request(tmp_path, **fields)).spec
        return {key: value for key, value in spec.annotations.items() if not key.startswith("io.kubernetes.cri.")}

    scope, unified = "pod1.slice:podkeel:c1", replace(NODE, cgroup_version=2)
    limits = {"run.oci.systemd.subgroup": "container", "org.systemd.property.TasksMax": f"uint64 {2**64 - 1}"}
    assert told(cgroups_path=scope, node=unified) == limits
    assert told(cgroups_path=scope, node=unified, pids_limit=500)["org.systemd.property.TasksMax"] == "uint64 500"
    assert told(cgroups_path=scope) == {}
    assert told(node=unified) == {}


def test_errors_name_container_and_field(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as failed:
        build(request(tmp_path, config=secured(run_as_group={"value": 5})))
    assert str(failed.value).startswith("container 'app' of pod default/pod: run_as_group 5 is set without a user: ")


def test_a_privileged_container_needs_a_privileged_pod(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="pod that is not privileged"):
        build(request(tmp_path, config=secured(privileged=True)))
