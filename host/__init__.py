"""The thin layer to Linux and to the disk that every other room stands on; it knows nothing of pods or images."""
