"""orderbus without OpenTelemetry's SDK, where each message carries a trace context. The program is that of bench/peers/orderbus.py."""

from bench.child import main, run_with_uvloop
from bench.peers.traced import traced

if __name__ == "__main__":
    main({"telemetry": traced(0.0)}, run_with_uvloop)
