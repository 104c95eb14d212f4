"""SPDY and WebSocket connections; everything that the command line shares with the streaming server."""
