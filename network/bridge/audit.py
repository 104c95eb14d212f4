"""Compares the network in the store with the network in the kernel."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from network.attachment import Attachment
from network.bridge.links import BridgeLinks, IPInterface
from network.nftables.elements import compare_sets, elements_of
from network.nftables.ruleset import listed_elements
from network.status import Finding
from network.store import NetworkStore


def compare_store(store: NetworkStore, attachments: Collection[Attachment]) -> list[Finding]:
    """Rows that do not belong to any attachment."""
    known = {attachment.sandbox_id for attachment in attachments}
    findings = [
        Finding("address", row.address, f"held by sandbox {row.sandbox_id}, which has no attachment")
        for row in store.addresses()
        if row.released_at is None and row.sandbox_id not in known
    ]
    findings += [
        Finding("host port", str(port), f"held by sandbox {sandbox_id}, which has no attachment")
        for sandbox_id, port in store.host_ports()
        if sandbox_id not in known
    ]
    return findings


def compare_links(
    kernel: BridgeLinks, attachments: Collection[Attachment], live: Collection[str], unfinished: Collection[str]
) -> list[Finding]:
    """Attachments without a sandbox or without a link on the bridge, and links without an attachment."""
    present, attached = kernel.ports(), kernel.attached()
    findings: list[Finding] = []
    for attachment in attachments:
        if attachment.sandbox_id in unfinished:
            continue
        if attachment.sandbox_id not in live:
            addresses = ", ".join(attachment.addresses)
            findings.append(Finding("attachment", attachment.sandbox_id, f"its sandbox is gone, it holds {addresses}"))
        elif attachment.host_interface not in present:
            problem = f"missing, sandbox {attachment.sandbox_id} has no network"
            findings.append(Finding("link", attachment.host_interface, problem))
        elif attachment.limiter and attachment.limiter not in present:
            problem = f"missing, sandbox {attachment.sandbox_id} can send nothing"
            findings.append(Finding("link", attachment.limiter, problem))
        elif attachment.host_interface not in attached:
            problem = f"no port of bridge {kernel.name}, or down: sandbox {attachment.sandbox_id} has no network"
            findings.append(Finding("link", attachment.host_interface, problem))
    known = {name for attachment in attachments for name in attachment.links}
    return findings + [Finding("link", name, "belongs to no sandbox") for name in sorted(present - known)]


def compare_bridge(kernel: BridgeLinks, wanted: Sequence[IPInterface]) -> list[Finding]:
    """A bridge that is missing, is down, or has other addresses than the gateways of the ranges in use."""
    if kernel.index() is None:
        return [Finding("bridge", kernel.name, "missing")]
    present = set(kernel.addresses())
    findings = [] if kernel.is_up() else [Finding("bridge", kernel.name, "down")]
    findings += [Finding("bridge", kernel.name, f"address {a} missing") for a in wanted if a not in present]
    extra = present.difference(wanted)
    return findings + [Finding("bridge", kernel.name, f"address {address} is not its own") for address in extra]


def compare_elements(
    table: str,
    attachments: Collection[Attachment],
    unfinished: Collection[str],
    listing: list[bytes] | None,
) -> list[Finding]:
    """Elements of the nftables tables (from ``listing``) that are missing, or that belong to no attachment."""
    if listing is None:
        return [Finding("nftables table", table, "missing")]
    present = listed_elements(listing)
    wanted: set[tuple[str, str]] = set()
    allowed: set[tuple[str, str]] = set()
    for attachment in attachments:
        group = allowed if attachment.sandbox_id in unfinished else wanted
        group.update((element.set_name, str(element)) for element in elements_of(attachment))
    return compare_sets(wanted, allowed, present)
