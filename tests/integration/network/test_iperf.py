"""Bandwidth and speed as iperf3 sees them, between namespaces."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from network.attachment import Bandwidth
from tests.integration.network.conftest import Node, Pod
from tests.integration.network.namespaces import Namespace, request, wait_until
from tests.integration.network.test_bandwidth import is_limited_to
from tests.support.agent import SOON

_SECONDS = "2"
_WARM_UP = "0.5"

if shutil.which("iperf3") is None:
    pytest.skip("iperf3 is not installed", allow_module_level=True)


async def _pod(node: Node, name: str, bandwidth: Bandwidth | None = None) -> Pod:
    namespace = node.namespace()
    return Pod(namespace, await node.network.attach(request(name, namespace.path, (), bandwidth)))


def _rate(sender: Namespace, receiver: Namespace, address: str, *more: str) -> float:
    """Bits per second that arrived at a server in ``receiver``."""

    def listens() -> bool:
        return ":5201 " in receiver.command("ss", "-tln")

    server = receiver.run(lambda: subprocess.Popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL))
    try:
        wait_until(listens)
        words = ["iperf3", "-c", address, "-J", "-t", _SECONDS, "-O", _WARM_UP, *more]
        told = json.loads(sender.command(*words))
        server.wait(timeout=SOON)
    finally:
        server.kill()
        server.wait()
    return float(told["end"]["sum_received"]["bits_per_second"])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("rate", [10_000_000, 400_000_000])
async def test_rates_are_kept(dual: Node, rate: int, version: int) -> None:
    limited = await _pod(dual, "limited", Bandwidth(ingress=rate, egress=rate))
    free = await _pod(dual, "free")
    assert is_limited_to(lambda: _rate(free.namespace, limited.namespace, limited.address(version)), rate)
    assert is_limited_to(lambda: _rate(limited.namespace, free.namespace, free.address(version)), rate)


async def test_several_connections_share_the_rate(node: Node) -> None:
    limited, free = await _pod(node, "limited", Bandwidth(egress=50_000_000)), await _pod(node, "free")
    assert is_limited_to(lambda: _rate(limited.namespace, free.namespace, free.ip, "-P", "4"), 50_000_000)
