"""The answers of plugins, combined: each field has one owner."""
