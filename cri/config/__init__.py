"""The configuration: options, TOML, checks of values."""
