"""Logs, traces and metrics of calls."""
