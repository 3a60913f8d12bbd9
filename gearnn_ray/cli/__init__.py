"""The command line: parses options, runs jobs, prints results."""
