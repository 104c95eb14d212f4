"""The node's own AppArmor profile, used for RuntimeDefault. It is loaded at the start if the host has AppArmor."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from string import Template

from host import processes
from host.errors import PodkeelError
from runtime.specgen.node_facts import NodeFacts

DEFAULT_NAME = "podkeel-default"

_TEMPLATE = Path(__file__).with_name("apparmor_default.profile")
_ABI = Path("/etc/apparmor.d/abi/3.0")
_OWN_LABEL = Path("/proc/self/attr/current")
_ADMINISTRATION_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_LOAD_SECONDS = 60.0

_log = logging.getLogger("podkeel.apparmor")


async def load_default_profile(facts: NodeFacts) -> str:
    """Load the profile, or replace that of an earlier version. Returns its name; empty without AppArmor.

    If AppArmor is enabled but the profile cannot be loaded, this is logged and RuntimeDefault stays unconfined, as on a
    host without AppArmor: a node must be able to run the pods that repair it.
    """
    if not facts.apparmor_enabled:
        return ""
    try:
        parser = shutil.which("apparmor_parser", path=f"{os.environ.get('PATH', os.defpath)}:{_ADMINISTRATION_PATH}")
        if parser is None:
            raise PodkeelError("apparmor_parser is not installed: install the package apparmor")
        await processes.run([parser, "--replace"], stdin=default_profile().encode(), timeout=_LOAD_SECONDS)
    except (PodkeelError, OSError) as error:
        _log.error("AppArmor profile %s: cannot be loaded, containers run without it: %s", DEFAULT_NAME, error)
        return ""
    return DEFAULT_NAME


def default_profile() -> str:
    """The profile's text for this host. It allows signals from an agent that is itself confined."""
    label = _own_label()
    return Template(_TEMPLATE.read_text()).substitute(
        name=DEFAULT_NAME,
        # The rules are those of AppArmor 3.0. Without this line newer kernels would require more kinds of rules.
        abi="abi <abi/3.0>," if _ABI.exists() else "",
        agent="" if label == "unconfined" else f'  signal (receive) peer="{label}",\n',
    )


def _own_label() -> str:
    try:
        label = _OWN_LABEL.read_text().strip("\0\n")
    except OSError:
        return "unconfined"
    return label.rpartition(" (")[0] or label
