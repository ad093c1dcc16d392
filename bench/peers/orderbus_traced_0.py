"""orderbus with OpenTelemetry's SDK, where no message's trace is sampled. The program is that of bench/peers/orderbus.py."""

from bench.child import main
from bench.peers.traced import run, traced

if __name__ == "__main__":
    main({"telemetry": traced(0.0)}, run)
