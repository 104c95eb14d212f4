"""Firewalls of others, in a network namespace that represents the node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[3]

_LOOK = """
import asyncio, json, sys
from pathlib import Path
from host.database import Database
from network.nftables import firewalls
from network.bridge.network import BuiltInNetwork
from network.nftables.firewalls import find_obstacles
from network.ipam import parse_ranges
from network.options import NetworkOptions
from network.schema import MIGRATIONS

firewalls._LOOK_AGAIN_SOON_SECONDS = 60

async def main(folder, remedy):
    ranges = ("10.88.0.0/16", "fd00:88::/64")
    options = NetworkOptions(bridge="pods0", pod_cidrs=ranges, mtu=1500)
    database = Database(Path(folder) / "store.db", {"network": MIGRATIONS})
    network = BuiltInNetwork(options, database)
    await network.start()

    async def condition():
        await network._firewalls._looking
        await network._firewalls.look(parse_ranges(ranges))
        condition = network.condition()
        return [condition.ready, condition.reason, condition.message]

    answers = {"before": await condition()}
    found = await find_obstacles("pods0", parse_ranges(ranges))
    answers["obstacles"] = [[item.chain, item.certain, item.remedy] for item in found]
    if remedy == "do it":
        for item in found:
            process = await asyncio.create_subprocess_shell(item.remedy)
            assert await process.wait() == 0
        answers["after"] = await condition()
    await network.stop()
    database.close()
    print(json.dumps(answers))

asyncio.run(main(*sys.argv[1:]))
"""


def _look(folder: Path, firewall: str, remedy: str = "") -> dict[str, Any]:
    """The report on a node with that firewall, set up by a shell script; and after following its advice."""
    links = "ip link set lo up; ip link add eth0 type veth peer name far; ip link set eth0 up; ip link set far up"
    links += "; ip route add default dev eth0"
    script = f'set -e; {links}\n{firewall}\nexec "$@"'
    command = ["unshare", "-n", "sh", "-c", script, "sh", sys.executable, "-c", _LOOK, str(folder), remedy]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(_ROOT)}, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


_DOCKER = """
iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT; iptables -A DOCKER-USER -j RETURN
"""
_UFW = """
iptables -P FORWARD DROP; iptables -N ufw-before-forward; iptables -N ufw-user-forward
iptables -A FORWARD -j ufw-before-forward; iptables -A ufw-before-forward -j ufw-user-forward
iptables -A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"""
_FIREWALLD = """
nft -f - <<'END'
table inet firewalld {
  chain trusted { accept; }
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct state vmap { invalid : drop }
    iifname "lo" accept
    iifname { "eth1", "virbr*" } goto trusted
    ip6 daddr { ::/96, fd00::1 } reject with icmpv6 addr-unreachable
    reject with icmpx admin-prohibited
  }
}
END
"""
_OWN = """
nft -f - <<'END'
table ip mine {
  chain fw { type filter hook forward priority 0; policy drop; tcp dport 80 drop; }
}
END
"""


@pytest.mark.parametrize(
    ("firewall", "chain"),
    [
        (_DOCKER, "nftables chain FORWARD of table ip filter"),
        (_OWN, "nftables chain fw of table ip mine"),
    ],
)
def test_a_chain_that_drops_pods_packets_is_reported_with_a_remedy(tmp_path: Path, firewall: str, chain: str) -> None:
    told = _look(tmp_path, firewall, "do it")
    ready, reason, message = told["before"]
    assert (ready, reason) == (False, "ForwardingBlocked")
    assert str(message).startswith(f"{chain}, which Podkeel did not make, drops what pods send or receive: allow it")
    assert told["after"] == [True, "", ""]


@pytest.mark.parametrize(
    ("firewall", "chain", "remedy"),
    [
        (_UFW, "chain FORWARD of table ip filter", "ufw route allow in on pods0 && ufw route allow out on pods0"),
        (_FIREWALLD, "chain filter_FORWARD of table inet firewalld", "firewall-cmd --permanent --zone=trusted"),
    ],
)
def test_remedies_are_those_of_the_firewall(tmp_path: Path, firewall: str, chain: str, remedy: str) -> None:
    ((found, certain, advice),) = _look(tmp_path, firewall)["obstacles"]
    assert chain in found
    assert certain
    assert advice.startswith(remedy)


@pytest.mark.parametrize(
    "firewall",
    [
        "",
        "iptables -P INPUT DROP; iptables -P FORWARD ACCEPT",
        _DOCKER + "iptables -I FORWARD -i pods0 -j ACCEPT; iptables -I FORWARD -o pods0 -j ACCEPT",
        _UFW + "iptables -A ufw-user-forward -i pods0 -j ACCEPT; iptables -A ufw-user-forward -o pods0 -j ACCEPT",
        _FIREWALLD + "nft insert rule inet firewalld filter_FORWARD iifname pods0 goto trusted",
        "iptables -P FORWARD DROP; iptables -A FORWARD -s 10.88.0.0/16 -j ACCEPT;"
        "iptables -A FORWARD -d 10.88.0.0/16 -j ACCEPT",
    ],
)
def test_firewalls_that_accept_pods_packets_are_not_reported(tmp_path: Path, firewall: str) -> None:
    told = _look(tmp_path, firewall)
    assert told["obstacles"] == []
    assert told["before"] == [True, "", ""]


def test_chains_that_may_accept_pods_leave_the_network_ready(tmp_path: Path) -> None:
    told = _look(tmp_path, _DOCKER + "iptables -A FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT")
    assert [item[1] for item in told["obstacles"]] == [False]
    assert told["before"] == [True, "", ""]


def test_tables_from_before_nftables_are_read_too(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-n", "iptables-legacy", "-S"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel has no tables from before nftables")
    told = _look(tmp_path, "iptables-legacy -P FORWARD DROP", "do it")
    assert "iptables-legacy -I FORWARD -i pods0 -j ACCEPT" in str(told["before"][2])
    assert told["after"] == [True, "", ""]
