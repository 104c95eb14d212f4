"""Pods and containers as the agent knows them, and their rows in the store."""
