"""Pod manifests as users write them, turned into CRI messages."""
