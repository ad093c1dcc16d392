"""What drives the decisions of `_core`: anyio only, no driver."""
