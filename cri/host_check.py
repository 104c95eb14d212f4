"""What of this host an agent needs, what works and what is missing, for ``podkeel check``."""
