"""Other libraries' names and calls, answered by this one: a program written for them runs with its import changed."""
