"""Taking down everything an agent made on this host, while it is not running."""

from __future__ import annotations

import shutil

from host import mounts
from images.options import ImageOptions
from network.options import NetworkOptions
from runtime.agent import Agent
from runtime.layout import Layout
from runtime.options import RuntimeOptions


async def reset(runtime: RuntimeOptions, network: NetworkOptions, images: ImageOptions) -> None:
    """Remove all pods, the network and both folders. Raises WrongStateError while an agent holds the folders."""
    layout = Layout.of(runtime)
    if layout.data.exists() or layout.run.exists():
        async with Agent(runtime, network, images) as agent:
            for sandbox in list(agent.node.visible_sandboxes()):
                await agent.pods.remove(sandbox.id)
            await agent.node.network.destroy()
            await agent.node.cgroups.remove_base(runtime.cgroup_parent)
    for folder in (layout.run, layout.data):
        for target in mounts.mounts_below(folder):
            mounts.unmount(target, lazy=True)
        if folder.exists():
            shutil.rmtree(folder)
