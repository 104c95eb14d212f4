"""Pods and containers on this node: lifecycle, state, OCI runtimes, conmon, namespaces, events and recovery."""
