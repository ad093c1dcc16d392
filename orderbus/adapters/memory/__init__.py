"""Broker, store and claims inside the process: for tests, for the demo, and for programs that need no servers."""
