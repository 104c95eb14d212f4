from __future__ import annotations

from pathlib import Path

import pytest

from cli.manifest.manifest import MASKED_PATHS, PodPlan, read_manifest
from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2

SAMPLE = Path(__file__).parents[3] / "manifests/samples/hello.yaml"

FULL = """
apiVersion: v1
kind: Pod
metadata:
  name: full
  namespace: shop
  uid: 6f9619ff
  labels: {app: full}
  annotations: {note: "a: b"}
spec:
  hostname: front
  runtimeClassName: runc
  shareProcessNamespace: true
  dnsConfig:
    nameservers: [192.0.2.1]
    searches: [shop.example]
    options: [{name: ndots, value: "2"}, {name: edns0}]
  securityContext:
    runAsUser: 1000
    runAsGroup: 2000
    supplementalGroups: [3000, 3001]
    seccompProfile: {type: RuntimeDefault}
    sysctls: [{name: net.core.somaxconn, value: "1024"}]
  volumes:
  - {name: scratch, emptyDir: {}}
  - {name: logs, hostPath: {path: /var/log, type: Directory}}
  initContainers:
  - {name: first, image: one}
  containers:
  - name: main
    image: registry.example/app:1.2
    imagePullPolicy: Never
    command: [run, "$(GREETING)"]
    args: ["--name=$(NAME)", "$$(NAME)"]
    workingDir: /srv
    env:
    - {name: NAME, value: world}
    - {name: GREETING, value: "hello $(NAME)"}
    ports:
    - {name: web, containerPort: 80, hostPort: 8080, hostIP: 127.0.0.1}
    - {containerPort: 53, protocol: UDP}
    resources:
      requests: {cpu: 250m, memory: 1Gi}
      limits: {cpu: 1.5, memory: 128Mi}
    securityContext:
      runAsUser: 0
      readOnlyRootFilesystem: true
      allowPrivilegeEscalation: false
      capabilities: {add: [NET_ADMIN], drop: [ALL]}
    stdin: true
    tty: true
    volumeMounts:
    - {name: scratch, mountPath: /scratch, subPath: a/b}
    - {name: logs, mountPath: /logs, readOnly: true, mountPropagation: HostToContainer}
  - name: boss
    image: two
    securityContext: {privileged: true}
"""


def plan(text: str, pod_dir: str = "/pods") -> PodPlan:
    return read_manifest(text, pod_dir)


def pod_with(spec: str, container: str = "") -> str:
    return (
        "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {"
        + spec
        + " containers: [{name: b, image: c"
        + container
        + "}]}}"
    )


def test_the_sandbox_of_a_full_manifest() -> None:
    config = plan(FULL).config
    assert config.metadata == cri_pb2.PodSandboxMetadata(name="full", namespace="shop", uid="6f9619ff")
    assert config.hostname == "front"
    assert config.log_directory == "/pods/shop_full_6f9619ff/logs"
    assert dict(config.labels) == {
        "app": "full",
        "io.kubernetes.pod.name": "full",
        "io.kubernetes.pod.namespace": "shop",
        "io.kubernetes.pod.uid": "6f9619ff",
    }
    assert dict(config.annotations) == {"note": "a: b"}
    assert list(config.dns_config.servers) == ["192.0.2.1"]
    assert list(config.dns_config.searches) == ["shop.example"]
    assert list(config.dns_config.options) == ["ndots:2", "edns0"]
    assert list(config.port_mappings) == [
        cri_pb2.PortMapping(container_port=80, host_port=8080, host_ip="127.0.0.1"),
        cri_pb2.PortMapping(container_port=53, protocol=cri_pb2.UDP),
    ]
    assert dict(config.linux.sysctls) == {"net.core.somaxconn": "1024"}
    security = config.linux.security_context
    assert (security.run_as_user.value, security.run_as_group.value) == (1000, 2000)
    assert list(security.supplemental_groups) == [3000, 3001]
    assert security.privileged
    assert security.namespace_options == cri_pb2.NamespaceOption(pid=cri_pb2.POD)


def test_the_containers_of_a_full_manifest() -> None:
    planned = plan(FULL)
    assert planned.runtime_handler == "runc"
    assert [item.config.metadata.name for item in planned.init_containers] == ["first"]
    main, boss = planned.containers
    assert (main.pull_policy, boss.pull_policy) == ("Never", "IfNotPresent")
    config = main.config
    assert config.image == cri_pb2.ImageSpec(
        image="registry.example/app:1.2", user_specified_image="registry.example/app:1.2"
    )
    assert list(config.command) == ["run", "hello world"]
    assert list(config.args) == ["--name=world", "$(NAME)"]
    assert config.working_dir == "/srv"
    assert [(item.key, item.value) for item in config.envs] == [("NAME", b"world"), ("GREETING", b"hello world")]
    assert config.log_path == "main/0.log"
    assert config.labels["io.kubernetes.container.name"] == "main"
    assert (config.stdin, config.stdin_once, config.tty) == (True, False, True)
    assert list(config.mounts) == [
        cri_pb2.Mount(container_path="/scratch", host_path="/pods/shop_full_6f9619ff/volumes/scratch/a/b"),
        cri_pb2.Mount(
            container_path="/logs",
            host_path="/var/log",
            readonly=True,
            propagation=cri_pb2.PROPAGATION_HOST_TO_CONTAINER,
        ),
    ]
    assert config.linux.resources == cri_pb2.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=150_000, cpu_shares=256, memory_limit_in_bytes=128 * 2**20
    )
    security = config.linux.security_context
    assert (security.run_as_user.value, security.run_as_group.value) == (0, 2000)
    assert security.readonly_rootfs
    assert security.no_new_privs
    assert list(security.capabilities.add_capabilities) == ["NET_ADMIN"]
    assert list(security.capabilities.drop_capabilities) == ["ALL"]
    assert list(security.masked_paths) == list(MASKED_PATHS)
    assert security.seccomp.profile_type == cri_pb2.SecurityProfile.RuntimeDefault
    assert boss.config.linux.security_context.privileged
    assert not boss.config.linux.security_context.masked_paths


def test_the_sample_is_understood_whole() -> None:
    planned = plan(SAMPLE.read_text())
    assert planned.warnings == []
    assert [item.config.metadata.name for item in planned.containers] == ["web", "client"]


def test_a_pod_without_uid_gets_one() -> None:
    first, second = plan(pod_with("")), plan(pod_with(""))
    assert first.config.metadata.uid != second.config.metadata.uid
    assert first.config.metadata.namespace == "default"
    assert first.config.hostname == "a"


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("", cri_pb2.NamespaceOption(pid=cri_pb2.CONTAINER)),
        ("hostNetwork: true,", cri_pb2.NamespaceOption(pid=cri_pb2.CONTAINER, network=cri_pb2.NODE)),
        ("hostPID: true,", cri_pb2.NamespaceOption(pid=cri_pb2.NODE)),
        ("hostIPC: true,", cri_pb2.NamespaceOption(pid=cri_pb2.CONTAINER, ipc=cri_pb2.NODE)),
        ("shareProcessNamespace: true,", cri_pb2.NamespaceOption(pid=cri_pb2.POD)),
    ],
)
def test_namespaces(spec: str, options: cri_pb2.NamespaceOption) -> None:
    planned = plan(pod_with(spec))
    assert planned.config.linux.security_context.namespace_options == options
    assert planned.containers[0].config.linux.security_context.namespace_options == options


def test_what_has_no_effect_is_named() -> None:
    text = pod_with(
        "restartPolicy: Always, nodeName: n, volumes: [{name: v, secret: {}}, {name: e, emptyDir: {medium: Memory}}],",
        ", livenessProbe: {exec: {}}, env: [{name: E, valueFrom: {}}], resources: {limits: {nvidia.com/gpu: 1}}",
    )
    assert plan(text).warnings == [
        "spec.restartPolicy has no effect: containers that end are not started again",
        "spec.volumes[0].secret is not supported and has no effect",
        "spec.volumes[1].emptyDir.medium is not supported and has no effect",
        "spec.containers[0].env[0].valueFrom is not supported and has no effect",
        "spec.containers[0].resources.limits.nvidia.com/gpu is not supported and has no effect",
        "spec.containers[0].livenessProbe is not supported and has no effect",
        "spec.nodeName is not supported and has no effect",
    ]


def test_sidecars_are_not_waited_for() -> None:
    planned = plan(
        pod_with(
            "initContainers: [{name: i, image: x}, {name: s, image: x, restartPolicy: Always}],", ", restartPolicy: x"
        )
    )
    assert [(item.config.metadata.name, item.sidecar) for item in planned.init_containers] == [
        ("i", False),
        ("s", True),
    ]
    assert planned.warnings == [
        "spec.initContainers[1].restartPolicy: it runs beside what follows, but is not started again",
        "spec.containers[0].restartPolicy is not supported and has no effect",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "the manifest is not valid YAML: "),
        ("", "expected one Pod in the manifest, found 0 documents"),
        (
            "kind: Pod\n---\n{kind: Service}\n---\n[]",
            "expected one Pod in the manifest, found 3 documents (Pod, Service, no mapping): put each Pod into",
        ),
        (
            pod_with("", ", ports: [{containerPort: 65536}]"),
            "spec.containers[0].ports[0].containerPort: expected a port",
        ),
        (pod_with("", ", ports: [{containerPort: 1, hostPort: -1}]"), "spec.containers[0].ports[0].hostPort: expected"),
        (
            pod_with("initContainers: [{name: i, image: x, restartPolicy: Never}],"),
            "spec.initContainers[0].restartPolicy: expected one of Always, got 'Never'",
        ),
        ("[1]", "the manifest: expected a mapping, got [1]"),
        ("{apiVersion: apps/v1, kind: Deployment}", "expected apiVersion v1 and kind Pod, got apps/v1 Deployment"),
        ("{}", "expected apiVersion v1 and kind Pod, got neither"),
        ("{apiVersion: v1, kind: Pod}", "metadata.name must be given"),
        ("{apiVersion: v1, kind: Pod, metadata: {name: a}}", "spec.containers must name at least one container"),
        (pod_with("hostPID: true, shareProcessNamespace: true,"), "spec.hostPID and spec.shareProcessNamespace cannot"),
        (pod_with("hostNetwork: 1,"), "spec.hostNetwork: expected true or false, got 1"),
        (
            pod_with("restartPolicy: Sometimes,"),
            "spec.restartPolicy: expected one of Always, OnFailure, Never, got 'So",
        ),
        (pod_with("", ", image: 5"), "spec.containers[0].image: expected a string (quote it), got 5"),
        (pod_with("", ", command: sh"), 'spec.containers[0].command: expected a list, got "sh"'),
        (pod_with("", ", args: [5]"), "spec.containers[0].args[0]: expected a string (quote it), got 5"),
        (pod_with("", ", env: [{name: A, value: 5}]"), "spec.containers[0].env[0].value: expected a string (quote it)"),
        (pod_with("", ", ports: [{}]"), "spec.containers[0].ports[0].containerPort must be given"),
        (
            pod_with("", ", resources: {limits: {cpu: lots}}"),
            "spec.containers[0].resources.limits.cpu: expected a quan",
        ),
        (
            pod_with("", ", volumeMounts: [{name: v, mountPath: /v}]"),
            "spec.containers[0].volumeMounts[0].name: the pod",
        ),
        (pod_with("volumes: [{name: ../x, emptyDir: {}}],"), "spec.volumes[0].name: '../x' cannot name a volume"),
        (pod_with("volumes: [{name: x, hostPath: {path: x}}],"), "spec.volumes[0].hostPath.path: x is not an absolute"),
        (
            pod_with("volumes: [{name: v, secret: {}}],", ", volumeMounts: [{name: v, mountPath: /v}]"),
            "spec.containers[0].volumeMounts[0]: volume 'v' is neither an emptyDir nor a hostPath",
        ),
        (
            pod_with(
                "volumes: [{name: v, emptyDir: {}}],", ", volumeMounts: [{name: v, mountPath: /v, subPath: a/../b}]"
            ),
            "spec.containers[0].volumeMounts[0].subPath: a/../b must stay inside the volume",
        ),
        (pod_with("initContainers: [{name: b, image: c}],"), "two containers of the pod are named 'b'"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        plan(text)
    assert raised.value.message.startswith(message)


def test_volumes_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    volumes = (
        "{name: e, emptyDir: {}}, "
        f"{{name: d, hostPath: {{path: {tmp_path}/made/deep, type: DirectoryOrCreate}}}}, "
        f"{{name: f, hostPath: {{path: {tmp_path}/file, type: FileOrCreate}}}}, "
        f"{{name: t, hostPath: {{path: {tmp_path}/there, type: Directory}}}}"
    )
    planned = plan(pod_with(f"volumes: [{volumes}],"), str(tmp_path / "pods"))
    for volume in planned.volumes:
        volume.prepare()
    empty = planned.volumes[0].path
    assert empty.parent.parent.parent == tmp_path / "pods"
    assert empty.stat().st_mode & 0o777 == 0o777
    assert (tmp_path / "made/deep").is_dir()
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize("kind", ["Directory", "File", "Socket", "CharDevice", "BlockDevice"])
def test_a_host_path_that_must_exist(tmp_path: Path, kind: str) -> None:
    planned = plan(pod_with(f"volumes: [{{name: h, hostPath: {{path: {tmp_path}/none, type: {kind}}}}}],"))
    with pytest.raises(InvalidArgumentError, match=f"volume 'h': .*/none is no {kind} on this node"):
        planned.volumes[0].prepare()
