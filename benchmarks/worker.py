"""The loop of a benchmark's worker: a line in, a line of JSON out. Needs the standard library only.

Workers stay alive, and only one works at a time, so that pairs of timings are taken in turn.
"""

import json
import resource
import sys
import time
from collections.abc import Callable


def serve(run: Callable[[int], list[float]]) -> None:
    """Answers each number of steps on stdin by their losses, seconds, and peak memory in MB."""
    for line in sys.stdin:
        start = time.perf_counter()
        losses = run(int(line))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_mb": peak}), flush=True)
