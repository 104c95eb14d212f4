"""Which network is chosen, what makes it ready, and how the folder is followed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.errors import UnavailableError
from network.status import Condition
from tests.integration.network.cni import CniNode, cni_node
from tests.integration.network.namespaces import links_with, wait_until
from tests.support.agent import SOON
from tests.support.cni_plugins import failure, result


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CniNode]:
    async with cni_node(tmp_path) as made:
        yield made


async def _becomes(node: CniNode, reason: str) -> Condition:
    """Wait until the condition has that reason (none: is ready), as one who asks now and then."""
    await asyncio.to_thread(wait_until, lambda: node.network.cni.view.condition.reason == reason)
    return node.network.condition()


async def test_a_missing_configuration_is_reported_until_there_is_one(node: CniNode) -> None:
    await node.start()
    condition = node.network.condition()
    assert (condition.ready, condition.reason) == (False, "CniNotConfigured")
    assert str(node.configurations) in condition.message
    with pytest.raises(UnavailableError, match="no CNI configuration in"):
        await node.pod("one")
    path = node.configure(node.script("one"))
    assert (await _becomes(node, "")).ready
    await node.pod("one")
    path.unlink()
    await _becomes(node, "CniNotConfigured")
    assert node.network.attachment("one") is not None


async def test_a_folder_that_does_not_exist_yet_is_waited_for(node: CniNode) -> None:
    deep = node.folder / "a" / "b"
    node.options["cni_config_dir"] = str(deep)
    node.network = node.make()
    await node.start()
    plugin = node.script("one")
    path = node.configure(plugin)
    deep.parent.mkdir()
    deep.mkdir()
    shutil.copy(path, deep / "10-net.conflist")
    assert (await _becomes(node, "")).ready
    shutil.rmtree(deep.parent)
    await _becomes(node, "CniNotConfigured")
    deep.mkdir(parents=True)
    shutil.copy(path, deep / "10-net.conflist")
    assert (await _becomes(node, "")).ready


async def test_the_first_valid_file_by_name_is_used_and_broken_ones_are_reported(node: CniNode) -> None:
    node.configure(node.script("one"), name="20-second.conf")
    (node.configurations / "00-readme.txt").write_text("{")
    (node.configurations / "05-empty.conf").touch()
    await node.start()
    assert node.network.condition().ready
    wrong = node.configurations / "10-first.json"
    wrong.write_text("{")
    await node.network.cni.reload()
    assert node.network.condition().ready
    (finding,) = await node.network.audit(())
    assert str(wrong) in finding.problem
    assert (await node.pod("one")).ip
    await node.network.detach("one")
    (node.configurations / "20-second.conf").unlink()
    condition = await _becomes(node, "CniConfigurationInvalid")
    assert str(wrong) in condition.message
    wrong.unlink()
    await _becomes(node, "CniNotConfigured")


async def test_new_pods_use_the_new_configuration_and_old_ones_their_own(node: CniNode) -> None:
    node.configure(node.script("old"))
    await node.start()
    await node.pod("one")
    node.configure(node.script("new", ADD=result("10.206.9.9/24")))
    await asyncio.to_thread(wait_until, lambda: _plugins(node) == ["new"])
    assert (await node.pod("two")).ip == "10.206.9.9"
    await node.network.detach("one")
    await node.network.detach("two")
    assert [call.plugin for call in node.called("DEL")] == ["old", "new"]


def _plugins(node: CniNode) -> list[str]:
    configuration = node.network.cni.view.configuration
    return [plugin.type for plugin in configuration.plugins] if configuration else []


async def test_plugins_in_the_folder_of_the_network_come_and_go(node: CniNode) -> None:
    node.configure(node.script("first"), version="1.1.0")
    await node.start()
    assert _plugins(node) == ["first"]
    folder = node.configurations / "testnet"
    node.script("last", ADD=result("10.206.9.9/24"))
    folder.mkdir()
    (folder / "10-last.conf").write_text('{"type": "last"}')
    await asyncio.to_thread(wait_until, lambda: _plugins(node) == ["first", "last"])
    assert (await node.pod("one")).ip == "10.206.9.9"
    (folder / "10-last.conf").write_text("{")
    await _becomes(node, "CniConfigurationInvalid")
    (folder / "10-last.conf").unlink()
    await asyncio.to_thread(wait_until, lambda: _plugins(node) == ["first"])
    await node.network.detach("one")
    assert [call.plugin for call in node.called("DEL")] == ["last", "first"]


async def test_a_missing_plugin_is_reported_and_noticed_once_installed(
    node: CniNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("network.cni.network.LOOK_AGAIN_SECONDS", 0.05)
    node.configure({"type": "absent"})
    await node.start()
    condition = node.network.condition()
    assert condition.reason == "CniPluginMissing"
    assert "CNI plugin absent is in none of" in condition.message
    node.script("absent")
    await asyncio.sleep(0.06)
    node.network.condition()
    await _becomes(node, "")


async def test_the_highest_version_that_all_plugins_support_is_used(node: CniNode) -> None:
    first = node.script("first", versions=["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
    second = node.script("second", versions=["0.4.0", "1.0.0"])
    node.configure(first, second, version="0.3.1", cniVersions=["0.3.1", "0.4.0", "1.0.0", "1.1.0", "9.0.0"])
    await node.start()
    await node.pod("one")
    assert {call.settings["cniVersion"] for call in node.called("ADD")} == {"1.0.0"}


async def test_versions_without_a_common_one_are_reported(node: CniNode) -> None:
    node.configure(node.script("old", versions=["0.3.0", "0.3.1"]), version="1.0.0")
    await node.start()
    condition = node.network.condition()
    assert condition.reason == "CniPluginFailed"
    assert "asks for CNI 1.0.0, which plugin old does not support (it supports 0.3.0, 0.3.1)" in condition.message


async def test_status_is_asked_from_version_1_1_on(node: CniNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("network.cni.network.LOOK_AGAIN_SECONDS", 0.05)
    plugin = node.script("one", STATUS=failure(50, "the daemon is away"))
    node.configure(plugin, version="1.1.0")
    await node.start()
    condition = node.network.condition()
    assert (condition.ready, condition.reason) == (False, "CniPluginNotReady")
    assert "STATUS: failed with code 50: the daemon is away" in condition.message
    node.script("one")
    await asyncio.sleep(0.06)
    node.network.condition()
    await node.network.cni.settled()
    node.script("one", STATUS=failure(51, "again"))
    await asyncio.sleep(0.06)
    assert node.network.condition().ready  # from memory, and asked again in the background
    await node.network.cni.settled()
    assert not node.network.condition().ready


async def test_a_plugin_that_hangs_does_not_delay_the_start(node: CniNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("network.cni.network.START_SECONDS", 0.1)
    node.configure(node.script("slow", VERSION="sleep 30"))
    async with asyncio.timeout(SOON):
        await node.start()
    assert not node.network.condition().ready


@pytest.mark.parametrize("disabled", [False, True])
async def test_garbage_is_collected_at_the_start(node: CniNode, disabled: bool) -> None:
    node.configure(node.script("one"), version="1.1.0", disableGC=disabled)
    await node.start()
    await node.pod("kept")
    await node.restart("kept")
    if disabled:
        await node.pod("later")
        assert node.called("GC") == []
        return
    await asyncio.to_thread(wait_until, lambda: len(node.called("GC")) == 2)
    valid = [{"containerID": "kept", "ifname": "eth0"}]
    settings = node.called("GC")[-1].settings
    assert settings["cni.dev/valid-attachments"] == settings["cni.dev/attachments"] == valid


async def test_check_is_left_out_where_the_configuration_says_so(node: CniNode) -> None:
    plugin = node.script("one", CHECK=failure(1, "never"))
    node.configure(plugin, disableCheck="true")
    await node.start()
    await node.pod("one")
    assert await node.network.audit(["one"]) == []


async def test_auto_takes_the_bridge_until_a_configuration_appears(node: CniNode) -> None:
    await node.restart(mode="auto")
    first = await node.pod("first")
    assert first.attachment.host_interface in links_with("pk")
    path = node.configure(node.script("one", ADD=result("10.206.9.9/24")))
    await asyncio.to_thread(wait_until, lambda: node.network.current is node.network.cni)
    assert (await node.pod("second")).ip == "10.206.9.9"
    assert node.network.attachment("first") == first.attachment
    assert await node.network.audit(["first", "second"]) == []
    # What a plugin takes away while it is upgraded must not put pods on the bridge.
    path.unlink()
    await _becomes(node, "CniNotConfigured")
    assert node.network.condition().reason == "CniNotConfigured"
    await node.restart("first", "second")
    assert node.network.condition().reason == "CniNotConfigured"
    assert node.network.attachment("first") == first.attachment
    for sandbox_id in ("first", "second"):
        await node.network.detach(sandbox_id)
    await node.restart()
    assert node.network.current is node.network.built_in
    assert (await node.pod("third")).ip.startswith(f"{node.subnet}.")
    await node.network.destroy()
    assert links_with(node.bridge) == []


async def test_built_in_leaves_the_folder_alone(node: CniNode) -> None:
    node.configure(node.script("one"))
    await node.restart(mode="built-in")
    await node.pod("one")
    assert node.called() == []
    assert node.network.current is node.network.built_in
    await node.network.detach("one")
    await node.network.destroy()


async def test_destroy_gives_everything_back(node: CniNode) -> None:
    node.configure(node.script("one"))
    await node.start()
    await node.pod("a")
    await node.pod("b")
    await node.network.destroy()
    assert len(node.called("DEL")) == 2
    assert node.rows() == 0
