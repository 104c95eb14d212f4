"""What the agent itself does to the interfaces of CNI pods: enable loopback before ADD, delete links that DEL left."""

from __future__ import annotations

import errno

from host import libc
from host.concurrency import threads
from host.errors import NotFoundError
from network import rtnetlink
from network.netlink import NETLINK_ROUTE
from network.netlink_socket import NetlinkSocket


def bring_up_loopback(sandbox_id: str, netns_path: str) -> None:
    """Bring up ``lo`` in the namespace, because no plugin does. The calling thread moves to the namespace."""
    try:
        with threads.inside_namespace(netns_path, libc.CLONE_NEWNET), NetlinkSocket(NETLINK_ROUTE) as inside:
            inside.request([rtnetlink.set_up("lo")])
    except OSError as error:
        raise NotFoundError(f"sandbox {sandbox_id}: its network namespace {netns_path} is missing: {error}") from error


def remove_veth(name: str) -> None:
    """Delete the node's end of a pod's veth pair, if the link exists and is a veth. Raises OSError."""
    with NetlinkSocket(NETLINK_ROUTE) as route:
        try:
            kind = rtnetlink.find_link(route, name).kind
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return
        if kind == "veth":
            route.request([rtnetlink.delete_link(name)], tolerate=(errno.ENODEV,))
