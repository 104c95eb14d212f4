"""Documents of the OCI image specification: digests, manifests, platforms, references."""
