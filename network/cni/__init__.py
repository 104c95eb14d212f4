"""The other network: plugins of the Container Network Interface (CNI 0.3.0 to 1.1.0), run as programs."""
