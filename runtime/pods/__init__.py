"""The CRI's verbs for pod sandboxes."""
