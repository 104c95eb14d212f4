"""A pod whose creation failed or was cancelled does not block its name, even if its network cannot be released."""

from __future__ import annotations

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.test_cni import CniAgent, cni
from tests.support.agent import wait_for
from tests.support.cni_plugins import failure, result
from tests.support.pods import sandbox_config

__all__ = ["cni"]


@pytest.mark.parametrize("undo", ["fails", "hangs"])
@pytest.mark.parametrize("making", ["failed", "cancelled"])
def test_kubelet_can_continue_while_a_pod_is_still_being_undone(cni: CniAgent, making: str, undo: str) -> None:
    """The same call again, also with another configuration. A list shows one pod, and at the end nothing is left."""
    client, begun = cni.agent.client, cni.folders.folder / "begun"
    first = f"if [ -e {cni.broken} ]; then touch {begun}; " + (
        "sleep 1000" if making == "cancelled" else failure(42, "no")
    )
    gives_back = "sleep 1000" if undo == "hangs" else failure(100, "out of order")
    cni.folders.configure(
        cni.folders.script("only", ADD=f"{first}; fi\n{result()}", DEL=f"if [ -e {cni.broken} ]; then {gives_back}; fi")
    )
    cni.wait_ready()
    cni.broken.touch()
    config = sandbox_config(cni.agent)
    call = client.future("RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=config))
    wait_for(begun.exists, what="the plugin")
    if making == "cancelled":
        call.cancel()
    else:
        with pytest.raises(grpc.RpcError, match="failed with code 42"):
            call.result()
    wait_for(lambda: cni.folders.called("DEL"), what="the undoing")
    cni.folders.script("only", ADD=result(), DEL=f"if [ -e {cni.broken} ]; then {gives_back}; fi")
    again = client.run_sandbox(config)
    assert client.run_sandbox(config) == again
    assert [pod.id for pod in client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items] == [again]
    cni.broken.unlink()
    wait_for(lambda: [entry.name for entry in (cni.agent.run / "sandboxes").iterdir()] == [again], 30, "the undoing")
    assert client.run_sandbox(config) == again, "the first one has not taken the name along"
    client.call("StopPodSandbox", cri_pb2.StopPodSandboxRequest(pod_sandbox_id=again))
    client.call("RemovePodSandbox", cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=again))
    assert client.findings() == []
