"""Pure decisions: no I/O, no clock, no randomness. Only the standard library and msgspec are imported here."""
