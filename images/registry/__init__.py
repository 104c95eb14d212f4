"""The client of the OCI distribution API: hosts, credentials, transfers."""
