"""The end of a container: noticing it, waiting for it, finding its reason, and recording it."""
