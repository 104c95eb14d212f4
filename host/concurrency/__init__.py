"""Threads, tasks and undo steps that outlast a cancelled request."""
