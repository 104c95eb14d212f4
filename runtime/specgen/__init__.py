"""From the CRI's configuration to the OCI runtime's config.json."""
