"""What a burst of pods costs the event loop, in processor time, which does not depend on what else the machine does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path

from network.attachment import Attachment
from network.bridge.network import BuiltInNetwork
from network.node_network import NodeNetwork
from tests.integration.network.cni import cni_node
from tests.integration.network.conftest import Node
from tests.integration.network.namespaces import Namespace, request

_PODS = 50
_ATTEMPTS = 3
_MAX_SECONDS = 0.005


@contextlib.asynccontextmanager
async def _longest_turn() -> AsyncIterator[list[float]]:
    """The processor time that the loop's thread took between two looks at a timer that is always due: the longest."""
    longest = [0.0]
    over = asyncio.Event()

    async def watch() -> None:
        before = time.thread_time()
        while not over.is_set():
            await asyncio.sleep(0)
            now = time.thread_time()
            longest[0], before = max(longest[0], now - before), now
            await asyncio.sleep(0.0002)

    gc.collect()
    gc.freeze()  # as the agent does: a whole run of tests has much to look through
    watching = asyncio.create_task(watch())
    try:
        yield longest
    finally:
        over.set()
        await watching
        gc.unfreeze()


async def _burst(network: BuiltInNetwork | NodeNetwork, namespaces: list[Namespace]) -> float:
    """The longest turn while pods come at once, as calls do: one in each turn of the loop; and go likewise."""
    async with _longest_turn() as longest:
        attaching: list[asyncio.Task[Attachment]] = []
        for number, namespace in enumerate(namespaces):
            attaching.append(asyncio.create_task(network.attach(request(f"pod{number}", namespace.path))))
            await asyncio.sleep(0)
        attachments = await asyncio.gather(*attaching)
        assert len({attachment.addresses for attachment in attachments}) == _PODS
        detaching: list[asyncio.Task[None]] = []
        for number in range(_PODS):
            detaching.append(asyncio.create_task(network.detach(f"pod{number}")))
            await asyncio.sleep(0)
        await asyncio.gather(*detaching)
    return longest[0]


async def test_a_burst_on_the_bridge_does_not_hold_the_loop(node: Node) -> None:
    longest = []
    for _ in range(_ATTEMPTS):
        namespaces = [node.namespace() for _ in range(_PODS)]
        longest.append(await _burst(node.network, namespaces))
        for namespace in namespaces:
            namespace.close()
    print([f"{seconds * 1000:.1f} ms" for seconds in longest])
    assert min(longest) < _MAX_SECONDS


async def test_a_burst_on_a_cni_network_does_not_hold_the_loop(tmp_path: Path) -> None:
    longest = []
    async with cni_node(tmp_path) as node:
        node.configure(node.bridge_plugin())
        await node.start()
        for _ in range(_ATTEMPTS):
            namespaces = [node.namespace() for _ in range(_PODS)]
            longest.append(await _burst(node.network, namespaces))
            for namespace in namespaces:
                namespace.close()
        assert (node.leases, node.rows()) == ([], 0)
    print([f"{seconds * 1000:.1f} ms" for seconds in longest])
    assert min(longest) < _MAX_SECONDS
