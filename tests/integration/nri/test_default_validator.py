"""The agent's own validator: each rule refuses what a plugin changes, and says which plugin and what."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent
from tests.support.nri import Recorder, connected
from tests.support.pods import container_config, sandbox_config

REQUIRED, TOLERATE = "required-plugins.noderesource.dev", "tolerate-missing.example.com"
OPTIONS = f"""
[nri.default_validator]
enabled = true
reject_oci_hooks = true
reject_runtime_default_seccomp = true
reject_unconfined_seccomp = true
reject_custom_seccomp = true
reject_namespaces = true
reject_sysctls = true
required_plugins = ["guard"]
tolerate_missing_annotation = "{TOLERATE}"
"""


@pytest.fixture(scope="module")
def shared_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("nri-validator"), busybox, options=OPTIONS) as made:
        yield made


def create(agent: AgentProcess, annotations: dict[str, str] | None = None, *, profile: Any = None) -> str:
    """A new container ``main`` in a new pod with ``annotations``."""
    sandbox = sandbox_config(agent, annotations=annotations)
    config = container_config("main", "sleep", "1000")
    if profile is not None:
        config.linux.security_context.seccomp.CopyFrom(profile)
    return agent.client.create(agent.client.run_sandbox(sandbox), config, sandbox)


def guard(agent: AgentProcess, **adjust: Any) -> Recorder:
    """The required plugin; it adjusts each container in this way."""
    answer = nri_pb2.CreateContainerResponse(adjust=nri_pb2.ContainerAdjustment(**adjust))
    return Recorder(agent.nri_socket, name="guard", acting={"CreateContainer": lambda _request: answer})


def linux(**fields: Any) -> dict[str, Any]:
    return {"linux": nri_pb2.LinuxContainerAdjustment(**fields)}


REFUSED = {
    "OciHooks": {"hooks": nri_pb2.Hooks(poststop=[nri_pb2.Hook(path="/bin/true")])},
    "Namespace": linux(namespaces=[nri_pb2.LinuxNamespace(type="uts")]),
    "Sysctl": linux(sysctl={"net.core.somaxconn": "77"}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_a_rule_refuses_fails_the_creation_with_plugin_and_field(agent: AgentProcess, field: str) -> None:
    with connected(guard(agent, **REFUSED[field])), pytest.raises(grpc.RpcError) as caught:
        create(agent)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"NRI plugin 10-guard changes {field}, which nri.default_validator refuses" in caught.value.details()
    assert agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers == []


@pytest.mark.parametrize("kind", ["RuntimeDefault", "Unconfined", "Localhost"])
def test_a_changed_seccomp_policy_is_refused_by_the_kind_of_profile(
    agent: AgentProcess, tmp_path: Path, kind: str
) -> None:
    profile = cri_pb2.SecurityProfile(profile_type=kind)
    if kind == "Localhost":
        (tmp_path / "profile.json").write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
        profile.localhost_ref = str(tmp_path / "profile.json")
    policy = nri_pb2.LinuxSeccomp(default_action="SCMP_ACT_ALLOW")
    with (
        connected(guard(agent, **linux(seccomp_policy=policy))),
        pytest.raises(grpc.RpcError, match=r"10-guard changes SeccompPolicy.*refuses"),
    ):
        create(agent, profile=profile)


def test_adjustments_without_a_rule_are_accepted(agent: AgentProcess) -> None:
    with connected(guard(agent, env=[nri_pb2.KeyValue(key="A", value="1")])):
        create(agent)


def test_each_seccomp_rule_is_about_its_own_kind_of_profile(tmp_path: Path, busybox: Path) -> None:
    options = "[nri.default_validator]\nenabled = true\nreject_custom_seccomp = true\n"
    kinds = cri_pb2.SecurityProfile
    with running_agent(tmp_path, busybox, options=options) as agent:
        policy = nri_pb2.LinuxSeccomp(default_action="SCMP_ACT_ALLOW")
        with connected(guard(agent, **linux(seccomp_policy=policy))):
            for kind in (kinds.RuntimeDefault, kinds.Unconfined):
                create(agent, profile=kinds(profile_type=kind))


def missing(agent: AgentProcess, plugin: str, annotations: dict[str, str] | None = None) -> None:
    """The creation fails because ``plugin`` did not see the container."""
    with pytest.raises(grpc.RpcError, match=f"plugins that it requires were not called for it: {plugin}: ") as caught:
        create(agent, annotations)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_plugin_that_the_configuration_requires_must_be_there(agent: AgentProcess) -> None:
    missing(agent, "guard")
    with connected(Recorder(agent.nri_socket, name="other")):
        missing(agent, "guard")
    with connected(guard(agent)):
        create(agent)


def test_a_plugin_that_died_over_the_container_did_not_see_it(agent: AgentProcess) -> None:
    plugin = guard(agent)
    plugin.acting = {"CreateContainer": lambda _request: plugin.close()}
    with connected(plugin):
        missing(agent, "guard")


def test_a_required_plugin_that_hangs_did_not_see_it(agent: AgentProcess) -> None:
    release = threading.Event()

    def hang(_request: Any) -> None:
        release.wait(20)

    plugin = guard(agent)
    plugin.acting = {"CreateContainer": hang}
    with connected(plugin):
        missing(agent, "guard")
        release.set()


def test_annotations_require_plugins_of_a_pod_or_of_one_container(agent: AgentProcess) -> None:
    with connected(guard(agent)):
        missing(agent, "tuner", {REQUIRED: '["tuner"]'})
        missing(agent, "tuner", {f"{REQUIRED}/pod": "[tuner, guard]"})
        missing(agent, "tuner", {f"{REQUIRED}/container.main": "- tuner\n"})
        create(agent, {f"{REQUIRED}/container.other": '["tuner"]'})
        create(agent, {REQUIRED: '["tuner"]', f"{REQUIRED}/container.main": "[]"})
        with connected(Recorder(agent.nri_socket, "20", "tuner")):
            create(agent, {REQUIRED: '["tuner"]'})
        with pytest.raises(grpc.RpcError, match=r"required-plugins.noderesource.dev is not a list"):
            create(agent, {REQUIRED: "{a: 1}"})


def test_an_annotation_tolerates_that_plugins_are_missing(agent: AgentProcess) -> None:
    create(agent, {TOLERATE: "true"})
    create(agent, {REQUIRED: '["tuner"]', f"{TOLERATE}/container.main": "true"})
    missing(agent, "guard", {TOLERATE: "false"})
    missing(agent, "guard", {f"{TOLERATE}/container.other": "true"})
    missing(agent, "guard", {TOLERATE: "true", f"{TOLERATE}/container.main": "false"})
