from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest

from host.errors import PodkeelError
from network.attachment import Bandwidth, limiter_name
from tests.integration.network.conftest import Node, Pod
from tests.integration.network.namespaces import Namespace, command, links_with, listen, request, wait_until

_WARM_UP_SECONDS = 0.3
_SECONDS = 1.5
_PIECE = bytes(65536)
# The direction without a limit is faster than this also on a busy machine, but perhaps not faster than the other rate.
_LOW = 5_000_000


async def _limited(node: Node, sandbox_id: str, bandwidth: Bandwidth) -> Pod:
    namespace = node.namespace()
    return Pod(namespace, await node.network.attach(request(sandbox_id, namespace.path, (), bandwidth)))


def is_limited_to(measure: Callable[[], float], rate: float) -> bool:
    """Whether a limit of ``rate`` holds in one of three measurements; without one, or with another, it would in none.

    On a machine that others use one may be too low, and one after a pause too high. That the kernel has exactly the
    rate that was asked for is checked by reading it back (``test_netlink.py``).
    """
    return any(rate / 2 < measure() < rate * 1.15 for _ in range(3))


def is_above(measure: Callable[[], float], rate: float) -> bool:
    """Whether one of three measurements is clearly above ``rate``."""
    return any(measure() > 1.3 * rate for _ in range(3))


def measured_rate(sender: Namespace, receiver: Namespace, address: str) -> float:
    """Bits per second of one TCP connection that is under way."""
    with listen(receiver, 0, host=address) as server, sender.open_socket() as client:
        client.settimeout(10)
        client.connect(server.getsockname())
        connection, _ = server.accept()
        connection.settimeout(10)
        enough = threading.Event()

        def send() -> None:
            while not enough.is_set():
                client.sendall(_PIECE)
            client.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        with connection:

            def receive(seconds: float) -> float:
                begin, received = time.monotonic(), 0
                while time.monotonic() < begin + seconds:
                    received += len(connection.recv(len(_PIECE)))
                return received * 8 / (time.monotonic() - begin)

            receive(_WARM_UP_SECONDS)
            rate = receive(_SECONDS)
            enough.set()
            while connection.recv(len(_PIECE)):
                pass
        thread.join()
    return rate


@pytest.mark.parametrize("rate", [_LOW, 200_000_000])
async def test_what_a_pod_receives_is_limited(node: Node, rate: int) -> None:
    pod = await _limited(node, "slow", Bandwidth(ingress=rate))
    other = await node.pod("other")
    assert is_limited_to(lambda: measured_rate(other.namespace, pod.namespace, pod.ip), rate)
    if rate == _LOW:
        assert is_above(lambda: measured_rate(pod.namespace, other.namespace, other.ip), rate)


@pytest.mark.parametrize("rate", [_LOW, 200_000_000])
async def test_what_a_pod_sends_is_limited(node: Node, rate: int) -> None:
    pod = await _limited(node, "slow", Bandwidth(egress=rate))
    other = await node.pod("other")
    assert is_limited_to(lambda: measured_rate(pod.namespace, other.namespace, other.ip), rate)
    if rate == _LOW:
        assert is_above(lambda: measured_rate(other.namespace, pod.namespace, pod.ip), rate)


async def test_limits_go_with_the_pod(node: Node) -> None:
    pod = await _limited(node, "slow", Bandwidth(ingress=1_000_000, egress=10**12))
    assert pod.attachment.limiter in node.links()
    assert await node.network.audit(["slow"]) == []
    await node.restart()
    assert await node.network.audit(["slow"]) == []
    await node.network.detach("slow")
    assert pod.attachment.limiter not in node.links()
    pod.namespace.close()
    await asyncio.to_thread(wait_until, lambda: node.links() == [])
    await node.assert_empty()


async def test_a_limiter_left_by_a_killed_attempt_is_taken_over(node: Node) -> None:
    name = limiter_name(node.bridge, "slow")
    command("ip", "link", "add", name, "type", "ifb")
    pod = await _limited(node, "slow", Bandwidth(egress=5_000_000))
    other = await node.pod("other")
    assert is_limited_to(lambda: measured_rate(pod.namespace, other.namespace, other.ip), 5_000_000)


async def test_a_lost_limiter_is_made_again_and_a_stray_one_removed(node: Node) -> None:
    pod = await _limited(node, "slow", Bandwidth(egress=5_000_000))
    stray = limiter_name(node.bridge, "stray")
    command("ip", "link", "delete", pod.attachment.limiter)
    command("ip", "link", "add", stray, "type", "ifb")
    findings = {(finding.kind, finding.object) for finding in await node.network.repair(["slow"])}
    assert findings == {("link", pod.attachment.limiter), ("link", stray)}
    assert links_with(stray) == []
    assert await node.network.audit(["slow"]) == []
    other = await node.pod("other")
    assert is_limited_to(lambda: measured_rate(pod.namespace, other.namespace, other.ip), 5_000_000)


async def test_a_failure_leaves_no_limiter(node: Node) -> None:
    namespace = node.namespace()
    namespace.command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    with pytest.raises(PodkeelError, match="File exists"):
        await node.network.attach(request("slow", namespace.path, (), Bandwidth(egress=5_000_000)))
    await node.assert_empty()
