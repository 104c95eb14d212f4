"""Turns a Kubernetes Pod manifest into the CRI messages that kubelet would send for it.

Follows https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/. Fields that have no effect here
are collected as warnings, by their paths.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import yaml

from cli.manifest import pod_folder, volumes
from cli.manifest.expansion import expand
from cli.manifest.fields import Fields
from cli.manifest.quantities import CPU_PERIOD, cpu_quota, cpu_shares, whole
from host.errors import InvalidArgumentError
from proto.runtime.v1 import cri_pb2

# What kubelet hides from containers that aren't privileged; the CRI takes an empty list to mean none.
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(slots=True)
class PodPlan:
    """What ``podkeel run`` makes of a manifest. Image names are as in the manifest; ids replace them after the pull."""

    config: cri_pb2.PodSandboxConfig
    runtime_handler: str
    volumes: list[volumes.Volume]
    init_containers: list[ContainerPlan] = field(default_factory=list)
    containers: list[ContainerPlan] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ContainerPlan:
    """One container: its configuration and when its image is pulled (``Always``, ``IfNotPresent``, ``Never``).

    A ``sidecar`` is an init container whose end is not waited for.
    """

    config: cri_pb2.ContainerConfig
    pull_policy: str
    sidecar: bool = False


def read_manifest(text: str, pod_dir: str | Path) -> PodPlan:
    """Plan the one Pod of a YAML text, its logs and volumes below ``pod_dir``.

    Raises InvalidArgumentError naming the field that is wrong.
    """
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise InvalidArgumentError(f"the manifest is not valid YAML: {' '.join(str(error).split())}") from error
    if len(documents) != 1:
        kinds = f" ({', '.join(map(_kind, documents))}): put each Pod into its own file" if documents else ""
        raise InvalidArgumentError(f"expected one Pod in the manifest, found {len(documents)} documents{kinds}")
    warnings: list[str] = []
    pod = Fields(documents[0], "", warnings)
    kind = f"{pod.text('apiVersion')} {pod.text('kind')}"
    if kind != "v1 Pod":
        raise InvalidArgumentError(f"expected apiVersion v1 and kind Pod, got {kind.strip() or 'neither'}")
    metadata = _metadata(pod.child("metadata"))
    pod.skip("status")
    plan = _plan(pod.child("spec"), metadata, Path(pod_dir))
    pod.finish()
    plan.warnings = warnings
    return plan


def _kind(document: object) -> str:
    return str(document.get("kind", "no kind")) if isinstance(document, dict) else "no mapping"


def _metadata(metadata: Fields) -> cri_pb2.PodSandboxConfig:
    name = metadata.required_text("name")
    identity = cri_pb2.PodSandboxMetadata(
        name=name,
        namespace=metadata.text("namespace", "default"),
        uid=metadata.text("uid") or str(uuid.uuid4()),
    )
    labels = metadata.string_map("labels") | pod_labels(identity)
    config = cri_pb2.PodSandboxConfig(
        metadata=identity, hostname=name, labels=labels, annotations=metadata.string_map("annotations")
    )
    metadata.finish()
    return config


def pod_labels(metadata: cri_pb2.PodSandboxMetadata) -> dict[str, str]:
    """The labels by which kubelet finds a pod."""
    return {
        "io.kubernetes.pod.name": metadata.name,
        "io.kubernetes.pod.namespace": metadata.namespace,
        "io.kubernetes.pod.uid": metadata.uid,
    }


def _plan(spec: Fields, config: cri_pb2.PodSandboxConfig, pod_dir: Path) -> PodPlan:
    folder = pod_folder.path(pod_dir, config.metadata)
    config.log_directory = str(folder / "logs")
    config.hostname = spec.text("hostname", config.hostname)
    namespaces = _namespaces(spec)
    security = spec.child("securityContext")
    config.linux.sysctls.update(
        {sysctl.required_text("name"): sysctl.required_text("value") for sysctl in security.children("sysctls")}
    )
    defaults = _identity(security, replace(_NOBODY_IN_PARTICULAR, groups=security.wholes("supplementalGroups")))
    security.finish()
    sandbox_security = config.linux.security_context
    sandbox_security.namespace_options.CopyFrom(namespaces)
    defaults.write(sandbox_security)
    if spec.choice("restartPolicy", ("Always", "OnFailure", "Never"), "Never") != "Never":
        spec.warnings.append("spec.restartPolicy has no effect: containers that end are not started again")
    dns = spec.child("dnsConfig")
    config.dns_config.servers.extend(dns.texts("nameservers"))
    config.dns_config.searches.extend(dns.texts("searches"))
    for option in dns.children("options"):
        name, value = option.required_text("name"), option.text("value")
        config.dns_config.options.append(f"{name}:{value}" if value else name)
    dns.finish()
    plan = PodPlan(config, spec.text("runtimeClassName"), volumes.read_volumes(spec, folder / "volumes"))
    for fields in spec.children("initContainers"):
        sidecar = _is_sidecar(fields)
        plan.init_containers.append(replace(_container(fields, plan, namespaces, defaults), sidecar=sidecar))
    plan.containers.extend(_container(fields, plan, namespaces, defaults) for fields in spec.children("containers"))
    spec.finish()
    if not plan.containers:
        raise InvalidArgumentError("spec.containers must name at least one container")
    names = [item.config.metadata.name for item in (*plan.init_containers, *plan.containers)]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgumentError(f"two containers of the pod are named {name!r}; names must differ")
    privileged = any(
        item.config.linux.security_context.privileged for item in (*plan.init_containers, *plan.containers)
    )
    sandbox_security.privileged = privileged
    return plan


def _namespaces(spec: Fields) -> cri_pb2.NamespaceOption:
    node, pod, own = cri_pb2.NODE, cri_pb2.POD, cri_pb2.CONTAINER
    host_pid, shared = spec.flag("hostPID"), spec.flag("shareProcessNamespace")
    if host_pid and shared:
        raise InvalidArgumentError("spec.hostPID and spec.shareProcessNamespace cannot both be true")
    return cri_pb2.NamespaceOption(
        network=node if spec.flag("hostNetwork") else pod,
        ipc=node if spec.flag("hostIPC") else pod,
        pid=node if host_pid else pod if shared else own,
    )


@dataclass(frozen=True, slots=True)
class _Identity:
    """The user of the processes, and the system calls that they may make."""

    user: int | None
    group: int | None
    groups: list[int]
    seccomp: cri_pb2.SecurityProfile

    def write(self, context: cri_pb2.LinuxSandboxSecurityContext | cri_pb2.LinuxContainerSecurityContext) -> None:
        if self.user is not None:
            context.run_as_user.value = self.user
            if self.group is not None:
                context.run_as_group.value = self.group
        context.supplemental_groups.extend(self.groups)
        context.seccomp.CopyFrom(self.seccomp)


_NOBODY_IN_PARTICULAR = _Identity(None, None, [], cri_pb2.SecurityProfile(profile_type="Unconfined"))


def _identity(security: Fields, default: _Identity) -> _Identity:
    """The identity of a security context, whose fields win over ``default``."""
    user, group = security.whole("runAsUser"), security.whole("runAsGroup")
    profile = security.child("seccompProfile")
    seccomp = default.seccomp
    if "type" in profile:
        kind = profile.choice("type", ("RuntimeDefault", "Unconfined", "Localhost"), "Unconfined")
        seccomp = cri_pb2.SecurityProfile(profile_type=kind, localhost_ref=profile.text("localhostProfile"))
    profile.finish()
    return _Identity(
        default.user if user is None else user,
        default.group if group is None else group,
        default.groups,
        seccomp,
    )


def _container(
    fields: Fields, plan: PodPlan, namespaces: cri_pb2.NamespaceOption, defaults: _Identity
) -> ContainerPlan:
    name = fields.required_text("name")
    image = fields.required_text("image")
    environment = _environment(fields)
    config = cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=name),
        image=cri_pb2.ImageSpec(image=image, user_specified_image=image),
        command=[expand(word, environment) for word in fields.texts("command")],
        args=[expand(word, environment) for word in fields.texts("args")],
        working_dir=fields.text("workingDir"),
        envs=[cri_pb2.KeyValue(key=key, value=value.encode()) for key, value in environment.items()],
        mounts=[volumes.mount(item, plan.volumes) for item in fields.children("volumeMounts")],
        labels={"io.kubernetes.container.name": name} | pod_labels(plan.config.metadata),
        log_path=f"{name}/0.log",
        stdin=fields.flag("stdin"),
        stdin_once=fields.flag("stdinOnce"),
        tty=fields.flag("tty"),
    )
    plan.config.port_mappings.extend(_port(port) for port in fields.children("ports"))
    config.linux.resources.CopyFrom(_resources(fields.child("resources")))
    _write_security(config.linux.security_context, fields.child("securityContext"), namespaces, defaults)
    policy = fields.choice("imagePullPolicy", ("Always", "IfNotPresent", "Never"), "IfNotPresent")
    return ContainerPlan(config, policy)


def _is_sidecar(fields: Fields) -> bool:
    if "restartPolicy" not in fields:
        return False
    fields.choice("restartPolicy", ("Always",), "Always")
    fields.warnings.append(f"{fields.at('restartPolicy')}: it runs beside what follows, but is not started again")
    return True


def _environment(fields: Fields) -> Mapping[str, str]:
    environment: dict[str, str] = {}
    for variable in fields.children("env"):
        name = variable.required_text("name")
        if "valueFrom" not in variable:
            environment[name] = expand(variable.text("value"), environment)
    return environment


def _port(port: Fields) -> cri_pb2.PortMapping:
    port.skip("name")
    container_port = port.whole("containerPort")
    if container_port is None:
        raise InvalidArgumentError(f"{port.at('containerPort')} must be given")
    host_port = port.whole("hostPort") or 0
    for key, number in (("containerPort", container_port), ("hostPort", host_port or 1)):
        if not 0 < number < 65536:
            raise InvalidArgumentError(f"{port.at(key)}: expected a port from 1 to 65535, got {number}")
    return cri_pb2.PortMapping(
        protocol=port.choice("protocol", ("TCP", "UDP", "SCTP"), "TCP"),
        container_port=container_port,
        host_port=host_port,
        host_ip=port.text("hostIP"),
    )


def _resources(fields: Fields) -> cri_pb2.LinuxContainerResources:
    limits, requests = fields.child("limits"), fields.child("requests")
    cpu_limit, memory_limit = limits.quantity("cpu"), limits.quantity("memory")
    cpu_request = requests.quantity("cpu") if "cpu" in requests else cpu_limit
    requests.skip("memory")
    resources = cri_pb2.LinuxContainerResources(
        cpu_period=CPU_PERIOD,
        cpu_shares=cpu_shares(cpu_request if cpu_request is not None else Fraction(0)),
        cpu_quota=cpu_quota(cpu_limit) if cpu_limit is not None else 0,
        memory_limit_in_bytes=whole(memory_limit) if memory_limit is not None else 0,
    )
    for part in (limits, requests, fields):
        part.finish()
    return resources


def _write_security(
    context: cri_pb2.LinuxContainerSecurityContext,
    fields: Fields,
    namespaces: cri_pb2.NamespaceOption,
    defaults: _Identity,
) -> None:
    context.namespace_options.CopyFrom(namespaces)
    context.privileged = fields.flag("privileged")
    context.readonly_rootfs = fields.flag("readOnlyRootFilesystem")
    context.no_new_privs = "allowPrivilegeEscalation" in fields and not fields.flag("allowPrivilegeEscalation")
    capabilities = fields.child("capabilities")
    context.capabilities.add_capabilities.extend(capabilities.texts("add"))
    context.capabilities.drop_capabilities.extend(capabilities.texts("drop"))
    capabilities.finish()
    _identity(fields, defaults).write(context)
    if not context.privileged:
        context.masked_paths.extend(MASKED_PATHS)
        context.readonly_paths.extend(READONLY_PATHS)
    fields.finish()
