"""A function over many items on all cores, in order, with few of them in memory at a time."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from utils import RunError, ignore_stop_signals

MapTasks = Callable[[Callable, Iterable], Iterator]  # like `map`
AHEAD = 2  # items a process that are read before their turn comes


@contextlib.contextmanager
def map_ordered(n_processes: int) -> Iterator[MapTasks]:
    """Yields a function like `map` that divides the calls among processes and reads items only as it needs them.

    Args:
        n_processes: in addition to this one; with 0, or with a single item, this process does everything.

    Raises: what the function raised, when it is that item's turn; RunError if a process was killed.
    """
    if not n_processes:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # a process with threads, as of a progress bar, is not to fork
    pool = ProcessPoolExecutor(n_processes, context, initializer=_end_with_parent)
    try:
        yield functools.partial(_map, pool, AHEAD * n_processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _map(pool: ProcessPoolExecutor, n_ahead: int, function: Callable, items: Iterable) -> Iterator:
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    waiting: deque = deque()
    try:
        for item in itertools.chain(first, items):
            waiting.append(pool.submit(function, item))
            if len(waiting) > n_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError(
            "a worker process has ended without a message (killed, or out of memory?); start again, with "
            "fewer --num_workers if memory is short."
        ) from None


def _end_with_parent() -> None:
    """The parent answers signals, but a helper whose parent was killed must not wait for it forever."""
    ignore_stop_signals()
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
