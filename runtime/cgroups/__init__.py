"""The agent's cgroups: their names, files and limits."""
