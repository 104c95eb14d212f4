"""Plugins that fail in every way, as scripts."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.errors import (
    AlreadyExistsError,
    DeadlineError,
    InvalidArgumentError,
    NotFoundError,
    PodkeelError,
    UnavailableError,
    WrongStateError,
)
from network.attachment import AttachRequest, Bandwidth, PodDns, PortMapping
from tests.integration.network.cni import CniNode, cni_node
from tests.integration.network.namespaces import descriptors, links_with, request, start, wait_until
from tests.support.agent import PATIENCE, SOON
from tests.support.cni_plugins import failure, result

_ROOT = Path(__file__).parents[3]


# Also in tests whose plugin hangs, the other plugins must end in time, which takes long on a busy machine.
hangs = pytest.mark.parametrize("limit", [PATIENCE])
_HANG = "sleep 1000"
_KILLED = r"did not finish within [0-9.]+ s and was killed"


@pytest.fixture
def limit() -> float:
    """The seconds after which a plugin is killed; shorter in tests marked with ``hangs``."""
    return 20 * PATIENCE


@pytest.fixture
async def node(tmp_path: Path, limit: float) -> AsyncIterator[CniNode]:
    async with cni_node(tmp_path, cni_timeout_seconds=limit) as made:
        yield made


async def _refused(node: CniNode, kind: type[PodkeelError], text: str) -> None:
    """An attach that must fail, and whose DEL must have left nothing."""
    with pytest.raises(kind, match=text):
        await node.pod("one")
    assert node.network.attachment("one") is None
    assert node.rows() == 0


@pytest.mark.parametrize(
    ("action", "kind", "text"),
    [
        (
            failure(999, "no more addresses", "pool is empty"),
            PodkeelError,
            "code 999: no more addresses .pool is empty",
        ),
        (failure(11, "still starting"), UnavailableError, "code 11: still starting"),
        ("kill -SEGV $$", PodkeelError, "was killed by signal 11"),
        ("echo worse >&2; exit 7", PodkeelError, "ended with status 7 and printed no error: worse"),
        ('echo \'{"code": "x"}\'; exit 1', PodkeelError, "status 1 and printed no error"),
        ("echo rubbish", PodkeelError, "printed 'rubbish' instead of a result"),
        ("true", PodkeelError, "printed 'nothing' instead of a result"),
        ("echo '[]'", PodkeelError, "instead of a result"),
        ("head -c 3000000 /dev/zero", PodkeelError, "instead of a result"),
        ("printf '\\377\\376'", PodkeelError, "instead of a result"),
    ],
)
async def test_the_error_of_a_plugin_is_reported(
    node: CniNode, action: str, kind: type[PodkeelError], text: str
) -> None:
    await _error_is_reported(node, action, kind, text)


@hangs
@pytest.mark.parametrize("action", [_HANG, f"{_HANG} & {_HANG}"])
async def test_a_plugin_that_hangs_is_killed_and_reported(node: CniNode, action: str) -> None:
    await _error_is_reported(node, action, DeadlineError, _KILLED)


async def _error_is_reported(node: CniNode, action: str, kind: type[PodkeelError], text: str) -> None:
    node.configure(node.script("first"), node.script("bad", ADD=action), node.script("last"))
    await node.start()
    await _refused(node, kind, f"(?s)({'CNI plugin bad, ADD' if kind is not PodkeelError else 'CNI'}.*{text})")
    told = [(call.plugin, call.command) for call in node.called()]
    assert told[:2] == [("first", "ADD"), ("bad", "ADD")]
    assert told[-3:] == [("last", "DEL"), ("bad", "DEL"), ("first", "DEL")]


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("echo '{}'", "gave the pod no address"),
        ("echo '{\"ips\": null}'", "gave the pod no address"),
        (result("10.206.0.300/24"), "is invalid"),
        (
            result("10.206.0.3/24").replace('"ips": [{', '"interfaces": [{}], "ips": [{"interface": 4, '),
            "is invalid: .* interface 4",
        ),
        ("echo '{\"ips\": 5}'", "is invalid"),
    ],
)
async def test_a_result_without_a_usable_address_is_an_error(node: CniNode, action: str, text: str) -> None:
    node.configure(node.script("only", ADD=action))
    await node.start()
    await _refused(node, PodkeelError, f"CNI network testnet: .*its plugins.*{text}")
    assert [call.command for call in node.called()] == ["ADD", "DEL"]


async def test_plugins_are_not_called_for_a_missing_namespace(node: CniNode) -> None:
    node.configure(node.script("one"))
    await node.start()
    with pytest.raises(NotFoundError, match="network namespace /nowhere"):
        await node.network.attach(request("one", "/nowhere"))
    assert node.called() == []
    assert node.rows() == 0


async def test_each_plugin_gets_all_arguments_and_only_its_own_capabilities(node: CniNode) -> None:
    capable = dict.fromkeys(("portMappings", "bandwidth", "dns", "ipRanges", "aliases", "unknown"), True)
    node.configure(
        {**node.script("first"), "own": {"deep": [1]}},
        {**node.script("second", ADD=result("10.206.0.9/24")), "capabilities": capable},
        version="0.4.0",
    )
    await node.start()
    await node.network.set_pod_cidrs(["10.206.0.0/24", "fd00::/64"])
    namespace = node.namespace()
    attachment = await node.network.attach(
        AttachRequest(
            sandbox_id="abc",
            netns_path=str(namespace.path),
            port_mappings=(PortMapping("tcp", 80, 31801), PortMapping("udp", 53, 31802, "127.0.0.1")),
            bandwidth=Bandwidth(ingress=8_000_000),
            name="web-0",
            namespace="prod",
            uid="u-1",
            dns=PodDns(("10.0.0.10",), ("svc",), ("ndots:5",)),
        )
    )
    assert attachment.addresses == ("10.206.0.9",)
    first, second = (call.settings for call in node.called("ADD"))
    assert first == {"type": "first", "own": {"deep": [1]}, "name": "testnet", "cniVersion": "0.4.0"}
    assert second["prevResult"]["ips"] == [{"address": "10.206.0.2/24"}]
    assert second["runtimeConfig"] == {
        "portMappings": [
            {"hostPort": 31801, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 31802, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
        ],
        "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 160_000},
        "dns": {"servers": ["10.0.0.10"], "searches": ["svc"], "options": ["ndots:5"]},
        "ipRanges": [[{"subnet": "10.206.0.0/24"}], [{"subnet": "fd00::/64"}]],
        "aliases": ["web-0"],
    }
    assert "capabilities" not in second
    arguments = (
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1"
    )
    search = f"{node.programs}:/usr/lib/cni"
    assert node.environment("ADD") == ["abc", str(namespace.path), "eth0", arguments, search]
    await node.network.detach("abc")
    assert node.environment("DEL") == ["abc", str(namespace.path), "eth0", arguments, search]
    last, earlier = (call.settings for call in node.called("DEL"))
    assert (last["type"], earlier["type"]) == ("second", "first")
    assert last["prevResult"]["ips"] == earlier["prevResult"]["ips"] == [{"address": "10.206.0.9/24"}]
    assert last["runtimeConfig"] == second["runtimeConfig"]


async def test_a_name_that_would_add_arguments_is_refused(node: CniNode) -> None:
    node.configure(node.script("one"))
    await node.start()
    with pytest.raises(InvalidArgumentError, match="K8S_POD_NAME 'a;IP=10"):
        await node.network.attach(AttachRequest("one", "/nowhere", name="a;IP=10.0.0.1"))


async def test_del_is_repeated_until_it_succeeds(node: CniNode) -> None:
    broken = node.folder / "broken"
    broken.touch()
    bad = node.script("bad", DEL=f"if [ -e {broken} ]; then {failure(100, 'out of order')}; fi")
    node.configure(bad, node.script("last"))
    await node.start()
    await node.pod("one", PortMapping("tcp", 80, 31803))
    for _ in range(2):
        with pytest.raises(PodkeelError, match="CNI plugin bad, DEL: failed with code 100: out of order"):
            await node.network.detach("one")
    (finding,) = await node.network.audit(["one"])
    assert "waits for its release: CNI plugin bad, DEL" in finding.problem
    with pytest.raises(AlreadyExistsError, match="31803"):
        await node.pod("two", PortMapping("tcp", 80, 31803))
    assert (node.rows(), node.told) == (1, [])
    broken.unlink()
    await asyncio.to_thread(wait_until, lambda: node.told == ["one"])
    assert node.rows() == 0
    assert await node.network.audit([]) == []
    await node.pod("two", PortMapping("tcp", 80, 31803))


@hangs
async def test_a_network_that_no_del_releases_can_be_given_up(node: CniNode) -> None:
    node.configure(node.script("bad", DEL=_HANG), {**node.bridge_plugin(), "isGateway": False})
    await node.start()
    pod = await node.pod("one", PortMapping("tcp", 80, 31804))
    link = pod.attachment.host_interface
    assert links_with(link) == [link]
    assert await node.network.give_up("one") is None  # nothing was tried yet
    with pytest.raises(PodkeelError):
        await node.network.detach("one")
    (node.programs / "bad").unlink()
    with pytest.raises(UnavailableError, match="CNI plugin bad is in none of"):
        await node.network.detach("one")
    told = await node.network.give_up("one")
    assert told is not None
    assert f"bad may hold {pod.ip} for ever (CNI plugin bad is in none of" in told
    assert links_with(link) == node.leases == []
    assert (node.rows(), node.network.attachment("one")) == (0, None)
    assert await node.network.give_up("one") is None
    assert await node.network.audit([]) == []
    node.script("bad")
    await node.pod("two", PortMapping("tcp", 80, 31804))


@hangs
async def test_a_del_under_way_ends_when_it_is_given_up(node: CniNode) -> None:
    pids = node.folder / "pids"
    node.configure(node.script("slow", DEL=f"echo $$ >> {pids}; {_HANG}"))
    await node.start()
    await node.pod("one")
    detaching = asyncio.create_task(node.network.detach("one"))
    await asyncio.to_thread(wait_until, lambda: pids.exists() and bool(pids.read_text()))
    told = await node.network.give_up("one")
    assert told is not None
    assert re.search(f"CNI plugin slow, DEL: {_KILLED}", told)
    with pytest.raises(WrongStateError, match="DEL was stopped: the network is released by force"):
        await detaching
    first, second = pids.read_text().split()
    assert not _runs(int(first))
    assert not _runs(int(second))
    assert node.rows() == 0


async def test_destroy_by_force_gives_up_what_fails_alone(node: CniNode) -> None:
    node.configure(node.script("bad", DEL="case $CNI_CONTAINERID in kept*) exit 1;; esac"))
    await node.start()
    await node.pod("kept")
    await node.pod("given back")
    with pytest.raises(PodkeelError, match="CNI plugin bad, DEL"):
        await node.network.destroy()
    (told,) = await node.network.destroy(force=True)
    assert "of sandbox kept: DEL is given up" in told
    assert node.rows() == 0


@hangs
async def test_a_pending_del_survives_a_restart_and_delays_no_start(node: CniNode) -> None:
    node.configure(node.script("slow", DEL=_HANG))
    await node.start()
    await node.pod("one")
    with pytest.raises(DeadlineError):
        await node.network.detach("one")
    go_on = node.folder / "go-on"
    node.script("slow", DEL=f"while [ ! -e {go_on} ]; do sleep 0.05; done")
    await node.network.stop()
    node.network = node.make()
    async with asyncio.timeout(SOON):
        await node.network.start()
        with pytest.raises(UnavailableError, match="in the background"):
            await node.network.detach("one")
        await node.network.repair(["one"])
    go_on.touch()
    await asyncio.to_thread(wait_until, lambda: node.rows() == 0)


async def test_a_cancelled_attach_ends_its_plugin_and_undoes_it(node: CniNode) -> None:
    pids = node.folder / "pids"
    node.configure(node.script("slow", ADD=f"sleep 0.5 & echo $! $$ > {pids}; wait"))
    await node.start()
    task = asyncio.create_task(node.pod("one"))
    await asyncio.to_thread(wait_until, lambda: pids.exists() and bool(pids.read_text()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.rows() == 0
    assert [call.command for call in node.called()] == ["ADD", "DEL"]
    await asyncio.to_thread(wait_until, lambda: not any(_runs(int(pid)) for pid in pids.read_text().split()))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


_ATTACH = """
import asyncio, sys
from pathlib import Path
from host.database import Database
from network.attachment import AttachRequest
from network.options import NetworkOptions
from network.node_network import NodeNetwork
from network.schema import MIGRATIONS

async def main(store, bridge, configurations, programs, namespace):
    options = NetworkOptions(mode="cni", bridge=bridge, cni_config_dir=configurations, cni_bin_dirs=(programs,))
    network = NodeNetwork(options, Database(Path(store), {"network": MIGRATIONS}))
    await network.start()
    await network.attach(AttachRequest("orphan" * 10, namespace))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_plugin_that_outlives_its_agent_is_ended_before_del(node: CniNode) -> None:
    pid = node.folder / "pid"
    done = node.folder / "done"
    node.configure(node.script("slow", ADD=f"echo $$ > {pid}; sleep 1; touch {done}"))
    namespace = node.namespace()
    folders = (str(node.folder / "store.db"), f"{node.bridge}b", str(node.configurations), str(node.programs))
    child = start(sys.executable, "-c", _ATTACH, *folders, str(namespace.path), folder=_ROOT)
    assert child.stdout is not None
    with child.stdout:
        await asyncio.to_thread(wait_until, lambda: pid.exists() and bool(pid.read_text()))
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert _runs(int(pid.read_text()))
    await node.start()
    assert not _runs(int(pid.read_text()))
    await asyncio.to_thread(wait_until, lambda: node.rows() == 0)
    assert [call.command for call in node.called()] == ["ADD", "DEL"]
    assert not done.exists()


async def test_the_loop_is_not_blocked_while_plugins_work(node: CniNode) -> None:
    begun, go_on = node.folder / "begun", node.folder / "go-on"
    waits = f"touch {begun}; for _ in $(seq 300); do [ -e {go_on} ] && break; sleep 0.1; done"
    node.configure(node.script("slow", ADD=f"{waits}; {result()}"))
    await node.start()
    task = asyncio.create_task(node.pod("one"))
    while not begun.exists():  # noqa: ASYNC110  # a file sets no event
        await asyncio.sleep(0)
    for _ in range(1000):
        await asyncio.sleep(0)
    assert not task.done(), "the loop stood still until the plugin's end"
    go_on.touch()
    await task


async def test_a_descriptor_and_a_child_are_left_by_no_failure(node: CniNode) -> None:
    node.configure(node.script("bad", ADD="exit 1"))
    await node.start()
    for round_number in range(3):
        await _refused(node, PodkeelError, "status 1")
        if round_number == 0:
            before = descriptors()
    # One namespace descriptor more or less may be on its way between threads.
    assert descriptors() <= before + 1


_TWO_PODS = """
from pathlib import Path
from network.attachment import Attachment
from network.cni.host_ports import open_localhost

lost, reached = (Attachment(name, "", (ip,), (), "", 1500) for name, ip in (("lost", "10.9.0.2"), ("one", "10.8.0.2")))
open_localhost([lost, reached])
print(Path("/proc/sys/net/ipv4/conf/there/route_localnet").read_text().strip())
"""


def test_a_pod_that_the_node_cannot_reach_keeps_no_other_from_its_host_ports() -> None:
    links = "ip link add there type veth peer name far; ip address add 10.8.0.1/24 dev there; ip link set there up"
    command = ["unshare", "-n", "sh", "-c", f'{links}; exec "$@"', "sh", sys.executable, "-c", _TWO_PODS]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "sandbox lost: host ports do not work on 127.0.0.1: the node cannot reach 10.9.0.2" in done.stderr
