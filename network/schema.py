"""The network's tables in the store."""

from __future__ import annotations

from host.kept_rows import Place

# The network's rows of a sandbox; announced ranges belong to all sandboxes.
ROWS_OF_SANDBOX = (
    Place("network_attachments", "sandbox_id = ?1"),
    Place("network_addresses", "sandbox_id = ?1"),
    Place("network_host_ports", "sandbox_id = ?1"),
    Place("network_cni_attachments", "sandbox_id = ?1"),
    Place("network_pod_cidrs", "?1 IS NOT NULL"),
)

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE network_attachments (
        sandbox_id TEXT PRIMARY KEY,
        attachment BLOB NOT NULL            -- an Attachment as JSON
    ) WITHOUT ROWID;
    CREATE TABLE network_addresses (
        address TEXT PRIMARY KEY,
        pool TEXT NOT NULL,                 -- the range it was taken from
        sandbox_id TEXT NOT NULL,
        allocated_at REAL NOT NULL,         -- seconds since the epoch
        released_at REAL                    -- set while it rests in quarantine
    ) WITHOUT ROWID;
    CREATE INDEX network_addresses_by_sandbox ON network_addresses (sandbox_id);
    CREATE INDEX network_addresses_resting ON network_addresses (released_at) WHERE released_at IS NOT NULL;
    CREATE TABLE network_host_ports (
        protocol TEXT NOT NULL,
        host_ip TEXT NOT NULL,              -- 0.0.0.0 or :: for every address of the family
        host_port INTEGER NOT NULL,
        sandbox_id TEXT NOT NULL,
        PRIMARY KEY (protocol, host_ip, host_port)
    ) WITHOUT ROWID;
    CREATE INDEX network_host_ports_by_sandbox ON network_host_ports (sandbox_id);
    CREATE TABLE network_pod_cidrs (
        position INTEGER PRIMARY KEY,
        cidr TEXT NOT NULL UNIQUE
    );
    """,
    """
    CREATE TABLE network_cni_attachments (
        sandbox_id TEXT PRIMARY KEY,
        record BLOB NOT NULL                -- a CniRecord as JSON
    ) WITHOUT ROWID;
    """,
)
