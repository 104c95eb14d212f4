"""Threads, tasks and undo steps that complete even if their request is cancelled."""
