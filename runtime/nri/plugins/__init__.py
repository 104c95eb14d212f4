"""Connections to plugins: sockets, frames, calls and events."""
