"""Images as files: docker archives and OCI layouts, read and written."""
