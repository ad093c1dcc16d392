"""orderbus with 1 % of the messages traced. The program is that of bench/peers/orderbus.py."""

from bench.child import main
from bench.peers.traced import run, traced

if __name__ == "__main__":
    main({"telemetry": traced(0.01)}, run)
