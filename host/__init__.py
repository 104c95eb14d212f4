"""The layer between the other rooms and Linux: system calls, files, processes, database. It knows no pods or images."""
