"""The built-in network: a bridge and a veth pair for each pod."""
