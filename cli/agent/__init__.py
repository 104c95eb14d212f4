"""Commands that are the agent or look at its host."""
