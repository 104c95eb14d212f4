"""Unpacks a layer's tar stream in a confined worker process."""
