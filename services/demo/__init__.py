"""The demo: real orders at a set rate through all six services, and a count at the end of what became of each."""
