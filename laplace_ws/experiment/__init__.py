"""Runs of the command line: a configuration in, a folder of results and checkpoints out."""
