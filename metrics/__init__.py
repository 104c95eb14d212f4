"""What the node knows of its containers and of itself, in numbers: cgroup readers, metrics, the Prometheus endpoint."""
