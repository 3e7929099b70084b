"""Run calls in processes if they take long, with results in order."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

from crysldnet.errors import DataError

T = TypeVar("T")

PATIENCE = 2.0
"""seconds; shorter work finishes sooner in one process"""


def run_in_order(calls: Iterator[Callable[[], T]], workers: int) -> Iterator[T]:
    """Run calls and yield their results in order: here, and in processes if the calls take long.

    Processes start after two seconds of work if the calls are slower than the consumer of the results.

    Args:
        calls: calls to run, each a ``functools.partial`` of a module's function, so that it can be pickled.
        workers: number of processes; 1 runs everything here.

    Raises:
        DataError: a process died; also whatever the calls raise.
    """
    workers = workers if _can_start_processes() else 1
    begun, busy = time.monotonic(), 0.0
    for call in calls:
        start = time.monotonic()
        result = call()
        busy += time.monotonic() - start
        yield result
        if workers > 1 and busy > PATIENCE and 2 * busy > time.monotonic() - begun:
            yield from _run_in_processes(calls, workers)
            return


def _can_start_processes() -> bool:
    """Return whether a new process can import the main module, which isn't possible if it was read from a pipe."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is None or os.path.exists(file)


def _run_in_processes(calls: Iterator[Callable[[], T]], workers: int) -> Iterator[T]:
    pending: deque[Future[T]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        for call in calls:
            pending.append(pool.submit(call))
            while len(pending) > 2 * workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that reads structures died: it ran out of memory, or the script that called lacks "
            'if __name__ == "__main__"; with workers=1 everything runs in one process'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Exit when the parent process is killed; otherwise this process would wait for work forever."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
