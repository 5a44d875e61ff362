"""Executors apply a function to items (units of work) in this process or on a dask cluster.

:func:`results` holds the rule for items that failed; it is the same for every executor.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from stillframe.errors import hopeless
from stillframe.log import log

Item = TypeVar("Item")
Work = Callable[[Item], Any]
Outcomes = Iterator[tuple[Item, Any]]
"""Items, each with the result of the work or with its exception."""

_PROCESS_BYTES = 350 * 2**20
"""Memory of a worker process before it reads a frame: Python, its libraries and compiled code."""
_SHARE = 0.7
"""Fraction of a worker's memory that units may fill. Above it, dask begins to spill and to pause the worker."""
_DOUBTFUL = 8
"""Failures without one success after which the settings are suspected, and failures are yielded at once."""
ON_WORKER = "on worker "
"""First words of the note that an error carries from the worker that raised it."""


@dataclass(frozen=True)
class Attempt(Generic[Item]):
    """An item to be worked on, and the worker to avoid."""

    item: Item
    """Argument of the work."""
    failed_on: str = ""
    """Address of the worker on which the item failed before; empty if there is none."""


class Executor(Protocol):
    """An object that applies a function to items and yields the results as they arrive."""

    @property
    def memory(self) -> int:
        """Memory of each worker, bytes."""

    @property
    def name(self) -> str:
        """Name in the log, such as "4 workers"."""

    @property
    def workers(self) -> int:
        """Number of items that are worked on at the same time."""

    def once(self, work: Work[Item], attempts: Iterable[Attempt[Item]], *, alone: bool) -> Outcomes[Item]:
        """Yield each item with its result or its exception, in any order; run one item at a time if ``alone``."""


def results(executor: Executor, work: Work[Item], items: Iterable[Item]) -> Outcomes[Item]:
    """Yield each item with its result, or with the exception of its last attempt.

    Failed items are retried after all others, on another worker if there is one. Items whose worker died are then
    retried one at a time, so that no other item is blamed, and are given up if the worker dies again. As long as no
    item succeeds, failures after the first few are yielded without a retry.
    """
    failed: list[Attempt[Item]] = []
    killed: list[Attempt[Item]] = []
    successes = 0
    for item, outcome in executor.once(work, map(Attempt, items), alone=False):
        if is_killed(outcome):
            killed.append(Attempt(item))
        elif isinstance(outcome, Exception) and not hopeless(outcome) and (successes or len(failed) < _DOUBTFUL):
            log.warning("failed, to be tried again after the others: %s: %s", type(outcome).__name__, outcome)
            failed.append(Attempt(item, worker_of(outcome)))
        else:
            successes += not isinstance(outcome, Exception)
            yield item, outcome
    for item, outcome in executor.once(work, failed, alone=False):
        if is_killed(outcome):
            killed.append(Attempt(item))
        else:
            yield item, outcome
    yield from executor.once(work, killed, alone=True)


def worker_of(error: Exception) -> str:
    """Return the address of the worker that raised an error; empty if the error has no such note."""
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(ON_WORKER))
    return next((note.removeprefix(ON_WORKER) for note in notes), "")


def is_killed(outcome: Any) -> bool:
    """True for dask's ``KilledWorker``: every worker that tried the item died."""
    return type(outcome).__name__ == "KilledWorker"


def unit_budget(executor: Executor) -> int:
    """Return the memory that one unit may take on each worker, bytes."""
    return int(_SHARE * executor.memory) - _PROCESS_BYTES


def process_memory(unit_bytes: int) -> int:
    """Return the memory of a worker process with a unit of the given size, bytes."""
    return _PROCESS_BYTES + unit_bytes


@dataclass(frozen=True)
class InProcess:
    """Executor that works on one item after the other in this process."""

    memory: int
    stop: threading.Event
    name: str = "this process"
    workers: int = 1

    def once(self, work: Work[Item], attempts: Iterable[Attempt[Item]], *, alone: bool) -> Outcomes[Item]:
        """Yield each item with its result or its exception, in order; items always run one at a time."""
        del alone
        for attempt in attempts:
            if self.stop.is_set():
                raise KeyboardInterrupt
            try:
                yield attempt.item, work(attempt.item)
            except Exception as error:  # reported with its unit; the others go on
                yield attempt.item, error
