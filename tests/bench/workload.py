"""The benchmark's calls to a CRI server: pods and containers as kubelet configures them."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from proto.runtime.v1 import cri_pb2
from tests.bench.client import Client
from tests.bench.samples import Samples

SLEEP_COMMAND = ("/bin/busybox", "sleep", "3600")
EXEC_COMMAND = ("/bin/busybox", "true")
RUN_LABEL = "bench.podkeel/run"


class Workload:
    """The pods of one run on one server. ``close`` removes the remaining ones."""

    def __init__(self, client: Client, name: str, *, image: str, handler: str, cgroup_parent: str, logs: Path) -> None:
        self.client = client
        self.name = name
        self._image = cri_pb2.ImageSpec(image=image)
        self._handler = handler
        self._cgroup_parent = cgroup_parent
        self._logs = logs
        self._run = uuid.uuid4().hex[:12]
        self._count = 0
        self._lock = threading.Lock()

    def cycle(self, samples: Samples) -> None:
        """Create and remove one pod with one container. Adds the duration of each call and of the ``cycle``."""
        begin = time.perf_counter_ns()
        with self.pod(samples) as (pod, config):
            with samples.timed("Create+Start"):
                container = self.create(pod, config, samples)
                self.start(container, samples)
            with samples.timed("ExecSync"):
                response = self.client.call(
                    "ExecSync", cri_pb2.ExecSyncRequest(container_id=container, cmd=EXEC_COMMAND, timeout=30)
                )
            if response.exit_code != 0:
                raise RuntimeError(f"{self.name}: exec of {EXEC_COMMAND} ended with {response.exit_code}")
            with samples.timed("Stop+Remove"):
                self.remove(container, samples)
        samples.add("cycle", (time.perf_counter_ns() - begin) / 1e6)

    @contextlib.contextmanager
    def pod(self, samples: Samples, *, own_cgroup: bool = False) -> Iterator[tuple[str, cri_pb2.PodSandboxConfig]]:
        """A ready sandbox. It is stopped and removed after the block, also after an error.

        ``own_cgroup`` gives it a separate parent, as kubelet does. Otherwise all pods share one.
        """
        config = self._pod_config()
        if own_cgroup:
            config.linux.cgroup_parent += f"/{config.metadata.uid}"
        with samples.timed("RunPodSandbox"):
            pod = self.client.call(
                "RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=config, runtime_handler=self._handler)
            ).pod_sandbox_id
        try:
            yield pod, config
        except BaseException:
            with contextlib.suppress(grpc.RpcError):  # the first failure is the one to report
                self.remove_pod(pod, Samples())
            raise
        with samples.timed("Stop+RemovePodSandbox"):
            self.remove_pod(pod, samples)

    def run_pod(self, port_mappings: Sequence[cri_pb2.PortMapping] = ()) -> str:
        """Call RunPodSandbox and return the id. The caller or ``close`` removes the pod."""
        config = self._pod_config()
        config.port_mappings.extend(port_mappings)
        request = cri_pb2.RunPodSandboxRequest(config=config, runtime_handler=self._handler)
        return str(self.client.call("RunPodSandbox", request).pod_sandbox_id)

    def remove_pod(self, pod: str, samples: Samples) -> None:
        """Call StopPodSandbox and RemovePodSandbox."""
        with samples.timed("StopPodSandbox"):
            self.client.call("StopPodSandbox", cri_pb2.StopPodSandboxRequest(pod_sandbox_id=pod))
        with samples.timed("RemovePodSandbox"):
            self.client.call("RemovePodSandbox", cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod))

    def create(self, pod: str, pod_config: cri_pb2.PodSandboxConfig, samples: Samples) -> str:
        """Call CreateContainer and return the id."""
        request = cri_pb2.CreateContainerRequest(
            pod_sandbox_id=pod, config=self._container_config(), sandbox_config=pod_config
        )
        with samples.timed("CreateContainer"):
            return str(self.client.call("CreateContainer", request).container_id)

    def start(self, container: str, samples: Samples) -> None:
        """Call StartContainer."""
        with samples.timed("StartContainer"):
            self.client.call("StartContainer", cri_pb2.StartContainerRequest(container_id=container))

    def stop(self, container: str, samples: Samples) -> None:
        """Call StopContainer without a grace period."""
        with samples.timed("StopContainer(0)"):
            self.client.call("StopContainer", cri_pb2.StopContainerRequest(container_id=container, timeout=0))

    def remove(self, container: str, samples: Samples) -> None:
        """Call StopContainer without a grace period, then RemoveContainer."""
        self.stop(container, samples)
        with samples.timed("RemoveContainer"):
            self.client.call("RemoveContainer", cri_pb2.RemoveContainerRequest(container_id=container))

    def version(self, samples: Samples, count: int) -> None:
        """Make ``count`` calls without work, to measure the cost of client, socket and server alone."""
        for _ in range(count):
            with samples.timed("Version"):
                self.client.call("Version", cri_pb2.VersionRequest(version="v1"))

    def parallel(self, samples: Samples, pods: int, clients: int) -> float:
        """Run ``pods`` cycles with ``clients`` clients at the same time. Returns pods per second."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(self.cycle, samples) for _ in range(pods)]:
                done.result()
        return pods / (time.perf_counter() - begin)

    def close(self) -> None:
        """Remove the remaining pods of this run."""
        mine = cri_pb2.PodSandboxFilter(label_selector={RUN_LABEL: self._run})
        for item in self.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest(filter=mine)).items:
            self.remove_pod(item.id, Samples())

    def _number(self) -> int:
        with self._lock:
            self._count += 1
            return self._count

    def _pod_config(self) -> cri_pb2.PodSandboxConfig:
        name = f"bench-{self._number()}"
        uid = str(uuid.uuid4())
        folder = self._logs / f"bench_{name}_{uid}"
        folder.mkdir()  # kubelet makes it too
        return cri_pb2.PodSandboxConfig(
            metadata=cri_pb2.PodSandboxMetadata(name=name, uid=uid, namespace="bench", attempt=0),
            hostname=name,
            log_directory=str(folder),
            dns_config=cri_pb2.DNSConfig(servers=["10.96.0.10"], searches=["bench.svc.cluster.local"]),
            labels={RUN_LABEL: self._run, "io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "bench"},
            linux=cri_pb2.LinuxPodSandboxConfig(
                cgroup_parent=self._cgroup_parent,
                security_context=cri_pb2.LinuxSandboxSecurityContext(
                    namespace_options=cri_pb2.NamespaceOption(pid=cri_pb2.CONTAINER)
                ),
            ),
        )

    def _container_config(self) -> cri_pb2.ContainerConfig:
        name = f"c{self._number()}"
        return cri_pb2.ContainerConfig(
            metadata=cri_pb2.ContainerMetadata(name=name, attempt=0),
            image=self._image,
            command=SLEEP_COMMAND,
            log_path=f"{name}.log",
            labels={RUN_LABEL: self._run, "io.kubernetes.container.name": name},
            linux=cri_pb2.LinuxContainerConfig(
                resources=cri_pb2.LinuxContainerResources(cpu_shares=128, memory_limit_in_bytes=128 * 1024 * 1024),
                security_context=cri_pb2.LinuxContainerSecurityContext(
                    namespace_options=cri_pb2.NamespaceOption(pid=cri_pb2.CONTAINER)
                ),
            ),
        )
