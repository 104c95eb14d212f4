"""Child processes: how they are started, adopted and collected."""
