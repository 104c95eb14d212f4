"""Measures containers and the agent: cgroup readers, metrics, the Prometheus endpoint."""
