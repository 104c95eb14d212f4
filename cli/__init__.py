"""The ``podkeel`` command: it runs the node agent, and is a client of the agent's socket."""
