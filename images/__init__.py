"""Images: references, registries, archives, layers unpacked once, and the overlay snapshots of containers."""
