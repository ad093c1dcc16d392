"""The fault matrix: each promise of docs/guarantees.md, while processes, servers and networks are broken for real. `make faults`."""
