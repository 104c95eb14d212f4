"""What the tests share: a real agent to talk to, images to give it, and the check that nothing is left behind."""
