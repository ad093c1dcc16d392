"""Everything that gets broken, a module for each kind; tests/faults/scenario.py imports them all."""
