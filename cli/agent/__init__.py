"""Commands that run the agent or examine its host."""
