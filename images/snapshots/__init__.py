"""A container's root file system: layers below, a writable layer on top."""
