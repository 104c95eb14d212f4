"""The files of a pod that its containers can write to: resolv.conf, hosts and hostname.

They are on a separate small file system, so that containers cannot fill the node's run folder.
"""

from __future__ import annotations

import os

from host import libc
from host.files import mounts
from runtime.namespaces.user import root_of
from runtime.pods.etc_files import hosts_file, resolv_conf
from runtime.specgen.namespaces import user_mappings
from runtime.state.sandbox import Sandbox

# For text that containers add. The node's own hosts file, which host network pods get, may have any size.
_ROOM = 1 << 20
_INODES = 8


def write_pod_files(sandbox: Sandbox) -> None:
    """Write the files on a new file system. ``drop_namespaces`` unmounts it. Blocks."""
    folder, dns = sandbox.folder, sandbox.config.dns_config
    hostname = (not sandbox.host_network and sandbox.config.hostname) or os.uname().nodename
    contents = {
        "resolv.conf": resolv_conf(dns.servers, dns.searches, dns.options),
        "hostname": f"{hostname}\n",
        "hosts": hosts_file(hostname, sandbox.record.addresses, host_network=sandbox.host_network),
    }
    size = _ROOM + sum(len(content.encode()) for content in contents.values())
    folder.files.mkdir(mode=0o711)
    flags = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
    libc.mount("files", str(folder.files), "tmpfs", flags, f"mode=0711,size={size},nr_inodes={_INODES}")
    mappings = user_mappings(sandbox.namespace_options)
    for name, content in contents.items():
        file = folder.files / name
        file.write_text(content)
        file.chmod(0o644)
        if mappings is not None:
            os.chown(file, *root_of(mappings))
