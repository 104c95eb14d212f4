"""Resource limits in config.json: those of the CRI and those that only plugins set."""
