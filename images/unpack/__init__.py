"""From a layer's tar stream to files, in a confined worker process."""
