"""The CRI's verbs for containers."""
