"""The network of CNI plugins (Container Network Interface 0.3.0 to 1.1.0), which the agent runs as programs."""
