"""retry: consume, where the first try of every tenth message fails.

Each retries as its documentation says for a failure that will pass: orderbus waits 0.1 s in the process, the delivery still in its hands;
FastStream gives the message back to the queue, which delivers it again at once; Celery and taskiq publish the task again at once;
dramatiq publishes it to its delay queue for 0.1 s, and from there again to its queue. Logging is off for all of them.
"""

from __future__ import annotations

from bench.workloads import Variant, Workload
from bench.workloads.consume import verify

WORKLOAD = Workload(
    name="retry",
    what="consume, with every tenth message failing once; each handled successfully once in the end",
    peers=("orderbus", "faststream", "celery", "taskiq", "dramatiq"),
    variants=(Variant("10 % fail once", 40_000),),
    shares={"faststream": 0.2, "celery": 0.1, "taskiq": 0.1, "dramatiq": 0.12},
    verify=verify,
)
