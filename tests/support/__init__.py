"""Shared code of the tests: a real agent, images for it, and the check that nothing is left behind."""
