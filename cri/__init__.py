"""The gRPC server: the services of the CRI and of the agent, which call the rooms below."""
