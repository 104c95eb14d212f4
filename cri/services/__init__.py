"""The services behind the CRI's calls and the agent's own."""
