"""Pod manifests for people, as the CRI's messages."""
