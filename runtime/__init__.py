"""Pods and containers on this node: lifecycle, state, OCI runtimes, monitors, namespaces, events and recovery."""
