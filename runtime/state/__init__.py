"""Pods and containers in the agent's memory, and their rows in the store."""
