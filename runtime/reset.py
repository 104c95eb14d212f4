"""Removes everything that an agent made on this host. The agent must not run."""

from __future__ import annotations

from host.files import mounts
from host.files.removal import remove_tree
from images.options import ImageOptions
from network.options import NetworkOptions
from runtime.agent import Agent
from runtime.layout import Layout
from runtime.options import RuntimeOptions
from runtime.recovery.lost_store import LostStore


async def reset(
    runtime: RuntimeOptions, network: NetworkOptions, images: ImageOptions, *, force: bool = False
) -> list[str]:
    """Remove all pods, the network and both folders. Raises WrongStateError while an agent uses the folders.

    With ``force``, attachments that CNI plugins do not release are given up. The returned sentences say so, and name
    files that could not be removed.
    """
    given_up: list[str] = []
    layout = Layout.of(runtime)
    if layout.data.exists() or layout.run.exists():
        async with Agent(runtime, network, images, LostStore.START_OVER, only_removes=True) as agent:
            for sandbox in list(agent.state.visible_sandboxes()):
                given_up += await agent.pod_removals.force_remove(sandbox.id) if force else []
                await agent.pod_removals.remove(sandbox.id)
            given_up += await agent.network.destroy(force=force)
            await agent.monitor_cgroup.remove()
            await agent.cgroups.remove_base(runtime.cgroup_parent)
    for folder in (layout.run, layout.data):
        for target in mounts.mounts_below(folder):
            mounts.unmount(target, lazy=True)
        if folder.exists():
            given_up += [f"could not be removed: {sentence}" for sentence in remove_tree(folder)]
    return given_up
