import signal
import sys

from bench.cli import app

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the vhost, the database and the processes with it
app(prog_name="python -m bench")
