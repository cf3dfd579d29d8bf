"""Runs of the command line: a configuration in, a folder of figures and checkpoints out."""
