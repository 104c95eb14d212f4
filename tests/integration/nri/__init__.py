"""A real agent with plugins over the sample stub."""
