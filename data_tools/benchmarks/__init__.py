"""Benchmarks of the data tools, each a module with a command line."""
