"""The gRPC surface: the CRI and the agent's own service over the rooms below."""
