"""OCI runtimes and conmon: the programs that run containers."""
