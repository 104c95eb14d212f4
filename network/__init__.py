"""Pod networks: the built-in bridge, addresses, host ports, and the resolver and identity files of a pod."""
