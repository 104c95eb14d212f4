"""The command line: every subcommand, its options and its help."""
