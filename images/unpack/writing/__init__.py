"""Writing the files of a layer, which is the root of the process that does it."""
