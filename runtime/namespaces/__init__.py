"""The namespaces of pods: how they are made, pinned and removed."""
