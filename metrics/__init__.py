"""Measurements of the node's containers and of the agent: cgroup readers, metrics, the Prometheus endpoint."""
