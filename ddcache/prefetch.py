"""Computing items ahead of their use on a background thread."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

T = TypeVar("T")
R = TypeVar("R")


def prefetch(function: Callable[[T], R], items: Iterable[T], depth: int) -> Generator[R]:
    """Yield `function(item)` in order, computed up to `depth` items ahead.

    An exception is raised where its item would have been yielded. Closing the generator early waits for the item in
    work, drops the rest, and leaves no thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="ddcache-prefetch")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
