"""The ``podkeel`` command: it serves the node agent, and is a client of the agent's socket like any other."""
