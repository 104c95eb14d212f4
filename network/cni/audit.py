"""Differences between the store, the plugins and the live sandboxes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from host.errors import PodkeelError
from network.cni.chain import PluginChain, namespace_exists
from network.cni.record import CniRecord, CniState
from network.status import Finding

_KIND = "CNI attachment"


async def compare(
    records: Sequence[CniRecord], chain: PluginChain, live: Collection[str], errors: Mapping[str, str]
) -> list[Finding]:
    """The errors of CHECK for live pods, attachments of pods that no longer exist, and failed DELs.

    ``errors`` has the errors of failed DELs, by sandbox.
    """
    findings: list[Finding] = []
    for record in records:
        if record.state is CniState.DELETING:
            reason = errors.get(record.sandbox_id, "DEL is running")
            findings.append(Finding(_KIND, record.sandbox_id, f"waits for its release: {reason}"))
        elif record.sandbox_id not in live:
            findings.append(Finding(_KIND, record.sandbox_id, "its sandbox is gone"))
    checked = [record for record in records if record.state is CniState.ADDED and record.sandbox_id in live]
    answers = await asyncio.gather(*(chain.check(record) for record in checked), return_exceptions=True)
    for record, answer in zip(checked, answers, strict=True):
        if isinstance(answer, PodkeelError):
            findings.append(Finding(_KIND, record.sandbox_id, answer.message))
        elif isinstance(answer, BaseException):
            raise answer
    return findings


def broken_files(folder: Path, broken: Sequence[str]) -> list[Finding]:
    """The files of the configuration folder that are skipped."""
    return [Finding("CNI configuration", str(folder), f"skipped: {sentence}") for sentence in broken]


def without_namespace(records: Sequence[CniRecord], errors: Collection[str]) -> list[CniRecord]:
    """Sandboxes whose DEL failed (``errors`` has the error of each) and whose network namespace is missing. Blocks."""
    deleting = (record for record in records if record.state is CniState.DELETING and record.sandbox_id in errors)
    return [record for record in deleting if not namespace_exists(record.netns_path)]
