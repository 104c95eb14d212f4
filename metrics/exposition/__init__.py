"""The metrics page: its routes, its text and its HTTP server."""
