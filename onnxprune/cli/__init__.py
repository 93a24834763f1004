"""The command line: one file a command, thin and lazy."""
