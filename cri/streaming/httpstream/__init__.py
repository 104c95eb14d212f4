"""SPDY and WebSocket connections: the code that the command line and the streaming server share."""
