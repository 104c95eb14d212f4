"""From a container's CRI configuration to the ``config.json`` an OCI runtime starts it by: one concern per module."""
