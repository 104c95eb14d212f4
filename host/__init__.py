"""The thin layer to Linux and the disk, which every other room uses. It knows nothing of pods or images."""
