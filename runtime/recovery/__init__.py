"""What happens at the agent's start: records, processes and leftovers are brought together."""
