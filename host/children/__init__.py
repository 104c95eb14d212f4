"""Child processes: starting, adopting and reaping them."""
