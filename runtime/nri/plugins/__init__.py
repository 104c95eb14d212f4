"""Plugins and what is said to them: sockets, frames, calls and events."""
