"""Units are worked on in this process or on a dask cluster; what fails or is lost there is tried again.

Nothing here knows how a cluster came to be: see :mod:`stillframe.clusters`.
"""

import contextlib
import functools
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from stillframe.errors import RunStopped, WorkerUnfit, hopeless
from stillframe.progress import warn
from stillframe.workers import Demands, refuse_unfit, unfit_of

log = logging.getLogger("stillframe")

Item = TypeVar("Item")

_PROCESS_BYTES = 350 * 2**20
"""What a worker takes before it sees a frame: Python with its libraries, and compiled code."""
_SHARE = 0.7
"""Part of a worker's memory that units may fill, below where dask begins to spill and pause."""
_POLL = 0.1
"""Seconds between two looks at whether to stop, while nothing gets done."""
_DOUBTFUL = 8
"""Failures without one success after which the fault is not taken to be the item's."""
_MOST_UNFIT = 8
"""Workers that are sent away before the run stops."""
_LOSSES = 3
"""How often a result may get lost before its item counts as failed."""
_FETCHED_WITHIN = 30.0
"""Seconds after which a result counts as lost; it is small."""
_RECOUNT = 2.0
"""Seconds between two counts of the workers."""
_WITHOUT_WORKERS = 60.0
"""Seconds without a result after which to look whether there are workers."""

_ON = "on worker "
_QUEUED = 2
"""Tasks given to each worker beyond the one it works on, so that it never waits."""
_AHEAD, _MOST_QUEUED = 0.25, 50
"""Seconds of work that are under way, and at most so many tasks for each worker, where tasks are short."""


@dataclass(frozen=True)
class Try(Generic[Item]):
    """An item to be worked on."""

    item: Item
    """What the work is given."""
    failed_on: str = ""
    """Address of the worker that failed on it before."""
    lost: int = 0
    """How often its result could not be fetched."""


class Executor(Protocol):
    """Something that applies a function to items and gives the results as they come."""

    @property
    def memory(self) -> int:
        """Bytes that each worker has."""
        ...

    @property
    def name(self) -> str:
        """What to call it in the log."""
        ...

    @property
    def workers(self) -> int:
        """How many items are worked on at a time."""
        ...

    def once(
        self, work: Callable[[Item], Any], tries: Iterable[Try[Item]], *, alone: bool
    ) -> Iterator[tuple[Item, Any]]:
        """Yield each item with its result, or with the exception it raised, in any order; one at a time if alone."""
        ...


def results(executor: Executor, work: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
    """Yield each item with its result, or with the exception it raised at last.

    What fails is tried again, elsewhere if it can be, when all others are done. An item whose worker died is then
    tried alone, so that no other is blamed for it, and given up when it dies again. Where nothing succeeds, failures
    are told at once after the first few.
    """
    again: list[Try[Item]] = []
    alone: list[Try[Item]] = []
    good = 0
    for item, outcome in executor.once(work, map(Try, items), alone=False):
        if is_killed(outcome):
            alone.append(Try(item))
        elif isinstance(outcome, Exception) and not hopeless(outcome) and (good or len(again) < _DOUBTFUL):
            log.warning("failed, to be tried again after the others: %s: %s", type(outcome).__name__, outcome)
            again.append(Try(item, where_of(outcome)))
        else:
            good += not isinstance(outcome, Exception)
            yield item, outcome
    for item, outcome in executor.once(work, again, alone=False):
        if is_killed(outcome):
            alone.append(Try(item))
        else:
            yield item, outcome
    yield from executor.once(work, alone, alone=True)


def _told_where(work: Callable[[Item], Any], demands: Demands | None, item: Item) -> Any:
    """Do the work on a worker that is fit for it; what it raises says where that was."""
    from distributed import get_worker

    try:
        if demands:
            refuse_unfit(demands, get_worker().local_directory)
        return work(item)
    except Exception as error:
        error.add_note(f"{_ON}{get_worker().address}")
        raise


def where_of(error: Exception) -> str:
    """Return the address of the worker that raised an error, if it is known."""
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(_ON))
    return next((note.removeprefix(_ON) for note in notes), "")


def unit_budget(executor: Executor) -> int:
    """Bytes that one unit may take on each worker."""
    return int(_SHARE * executor.memory) - _PROCESS_BYTES


def process_memory(unit_bytes: int) -> int:
    """Bytes that a worker process takes with a unit of so many."""
    return _PROCESS_BYTES + unit_bytes


def is_killed(outcome: Any) -> bool:
    """Tell whether the worker died, again and again, while it worked on this."""
    return type(outcome).__name__ == "KilledWorker"


@dataclass(frozen=True)
class InProcess:
    """One item after the other, here."""

    memory: int
    stop: threading.Event
    name: str = "this process"
    workers: int = 1

    def once(
        self, work: Callable[[Item], Any], tries: Iterable[Try[Item]], *, alone: bool
    ) -> Iterator[tuple[Item, Any]]:
        """Yield each item with its result, or with the exception it raised, in order and hence alone."""
        del alone
        for attempt in tries:
            if self.stop.is_set():
                raise KeyboardInterrupt
            try:
                yield attempt.item, work(attempt.item)
            except Exception as error:  # reported with its unit; the others go on
                yield attempt.item, error


@dataclass(frozen=True)
class OnCluster:
    """A dask cluster; a few tasks more than it has threads are under way at a time."""

    client: Any
    memory: int
    stop: threading.Event
    name: str
    workers: int
    keep: Callable[[int], None] | None = None
    """Told how many are there: brings back those that died, or stops where none would ever come."""
    patient: bool = True
    """Whether to wait for workers however long, where none is left."""
    demands: Demands | None = None
    """What workers are refused for lacking; nothing where they run in the driver's own surroundings."""
    absent: str = "Start workers; or stop this, which loses nothing."
    """What to say about workers that are waited for."""

    def once(
        self, work: Callable[[Item], Any], tries: Iterable[Try[Item]], *, alone: bool
    ) -> Iterator[tuple[Item, Any]]:
        """Yield each item with its result, or with the exception it raised, as they come."""
        waiting = iter(tries)
        tasks: dict[Any, Try[Item]] = {}
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        unfit = _Unfit(self.client)
        room = _Room(self, alone, unfit)

        def submit(some: Iterable[Try[Item]]) -> None:
            for future, attempt in self._submit(work, list(some), retries=0 if alone else 1):
                tasks[future] = attempt
                future.add_done_callback(done.put)

        submit(itertools.islice(waiting, room.tasks()))
        try:
            while tasks:
                ready = self._next(done, room)
                ended = [(tasks.pop(future), outcome) for future, outcome in self._outcomes(ready)]
                room.done += len(ended)
                again = [_to_repeat(attempt, outcome, unfit) for attempt, outcome in ended]
                submit(attempt for attempt in again if attempt)
                submit(itertools.islice(waiting, max(0, room.tasks() - len(tasks))))
                for (attempt, outcome), repeated in zip(ended, again, strict=True):
                    if not repeated:
                        yield attempt.item, _NOT_FETCHED if outcome is _FORGOTTEN else outcome
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self.client.cancel(list(tasks))

    def _submit(
        self, work: Callable[[Item], Any], tries: list[Try[Item]], retries: int
    ) -> Iterator[tuple[Any, Try[Item]]]:
        """Send tasks, all in one message but those that are to go elsewhere; yield each with its future."""
        told = functools.partial(_told_where, work, self.demands)
        plain = [attempt for attempt in tries if not attempt.failed_on]
        try:
            sent = self.client.map(told, [one.item for one in plain], pure=False, retries=retries) if plain else []
            yield from zip(sent, plain, strict=True)
            for attempt in tries:
                if attempt.failed_on:
                    place = self._elsewhere(attempt.failed_on)
                    yield self.client.submit(told, attempt.item, pure=False, retries=retries, **place), attempt
        except Exception as error:  # nothing but a closed client: what is sent is plain
            raise _lost(error) from error

    def _outcomes(self, futures: list[Any]) -> list[tuple[Any, Any]]:
        """Fetch what tasks returned, at once where all did."""
        if len(futures) > 1 and all(future.status == "finished" for future in futures):
            with contextlib.suppress(Exception):  # told one by one
                gather = functools.partial(self.client.gather, futures, asynchronous=True)
                return list(zip(futures, self.client.sync(gather, callback_timeout=_FETCHED_WITHIN), strict=True))
        return [(future, _outcome(future)) for future in futures]

    def _elsewhere(self, address: str) -> dict[str, Any]:
        """Ask for any worker but this one, unless it is the only one."""
        others = [worker for worker in self.client.nthreads() if worker != address]
        return {"workers": others, "allow_other_workers": True} if others else {}

    def _next(self, done: "queue.SimpleQueue[Any]", room: "_Room") -> list[Any]:
        """Wait for the next tasks to end, or for more workers, with an eye on a stop."""
        until = time.monotonic() + _WITHOUT_WORKERS
        while True:
            if self.stop.is_set():
                raise KeyboardInterrupt
            with contextlib.suppress(queue.Empty):
                return [done.get(timeout=_POLL), *(done.get() for _ in range(done.qsize()))]
            if room.grew():
                return []
            if time.monotonic() > until:
                until += self._warn_of_no_workers()

    def _warn_of_no_workers(self) -> float:
        """Say so if nobody is there to do the work; return when to look again."""
        if self.client.status != "running" or self.client.nthreads():
            return _WITHOUT_WORKERS
        if not self.patient and not self._come_back():
            raise RunStopped(
                "all worker processes ended and do not come back; the run's log tells more. What is finished is kept: "
                "give the same command again, with fewer --workers or more --memory if they ran out of it."
            )
        if self.patient:
            warn(f"no worker is connected: waiting. {self.absent}")
        return 10 * _WITHOUT_WORKERS

    def _come_back(self) -> bool:
        """Give workers that are just being started again a while."""
        until = time.monotonic() + _WITHOUT_WORKERS
        while not self.client.nthreads() and time.monotonic() < until:
            if self.stop.wait(_RECOUNT):
                raise KeyboardInterrupt
        return bool(self.client.nthreads())


def _to_repeat(attempt: Try[Item], outcome: Any, unfit: "_Unfit") -> Try[Item] | None:
    """Return what is to be tried once more, as nothing came of it yet."""
    if outcome is _FORGOTTEN and attempt.lost < _LOSSES:
        return replace(attempt, lost=attempt.lost + 1)
    if isinstance(outcome, WorkerUnfit):
        unfit.dismiss(where_of(outcome), outcome)
        return replace(attempt, failed_on=where_of(outcome))
    return None


@dataclass
class _Room:
    """How many tasks may be under way: a few more than there are workers, who may come and go.

    More where they are short: what is fetched and sent at once costs as much as one task alone.
    """

    cluster: OnCluster
    alone: bool
    unfit: "_Unfit"
    done: int = 0
    """Tasks that have ended."""
    _began: float = field(default_factory=time.monotonic)
    _counted: float = -math.inf
    _threads: int = 1
    _given: int = 0

    def tasks(self) -> int:
        """Return how many."""
        self._given = self._allowed()
        return self._given

    def grew(self) -> bool:
        """Tell whether it is more now than when that was asked last."""
        return self._allowed() > self._given

    def _allowed(self) -> int:
        """Return how many may be, after a look at the workers now and then."""
        self._count()
        if self.alone:
            return 1
        soon = int(_AHEAD * self.done / (time.monotonic() - self._began))
        return max((1 + _QUEUED) * self._threads, min(soon, _MOST_QUEUED * self._threads))

    def _count(self) -> None:
        client = self.cluster.client
        if client.status == "running" and time.monotonic() - self._counted > _RECOUNT:
            self._counted = time.monotonic()
            try:
                threads = client.nthreads()
                if self.cluster.demands:
                    self.unfit.look(self.cluster.demands, list(threads))
            except OSError:  # the scheduler is going; its tasks are going to say so
                return
            there = sum(threads.values())
            self._threads = max(1, there)
            if self.cluster.keep:
                self.cluster.keep(there)


@dataclass
class _Unfit:
    """Sends workers away that are not fit for the run, so that others come in their place."""

    client: Any
    sent: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    def look(self, demands: Demands, workers: Sequence[str]) -> None:
        """Ask those that were not there before: they cannot all answer for themselves."""
        if fresh := [address for address in workers if address not in self.seen]:
            self.seen.update(fresh)
            for address, lacks in unfit_of(self.client, demands, fresh).items():
                if lacks:
                    self.dismiss(address, lacks)

    def dismiss(self, address: str, why: object) -> None:
        """Send one away; stop where that does not help, and nobody else is there."""
        if address in self.sent:
            return
        self.sent.add(address)
        if len(self.sent) > _MOST_UNFIT and not set(self.client.nthreads()) - self.sent:
            raise RunStopped(f"one worker after the other is not fit for this run, the last one too: {why}")
        warn(f"worker {address} is sent away: {why}")
        self.client.retire_workers([address], close_workers=True)


_NOT_FETCHED = RuntimeError(
    "its result could not be fetched from the worker, again and again: are the same versions of everything installed "
    "there and here?"
)
_FORGOTTEN = object()
"""What is left of a result whose worker died before it was fetched: the work is durable, and its record is there."""


def _outcome(future: Any) -> Any:
    """Return what a task returned or raised; a task that was lost with its scheduler stops the run."""
    status = future.status
    if status == "error":
        return future.exception()
    if status in ("lost", "pending"):
        return _FORGOTTEN
    if status != "finished":
        raise _lost(status)
    try:
        return future.result(timeout=_FETCHED_WITHIN)
    except Exception as error:  # the task raised nothing, so that its result could not be fetched
        if future.status == "error":  # lost with its worker, it was done again, and killed the next ones
            return future.exception()
        if future.status in ("lost", "pending", "finished") and future.client.status == "running":
            return _FORGOTTEN
        raise _lost(error) from error


def _lost(reason: object) -> RunStopped:
    return RunStopped(
        f"the dask scheduler is gone or dropped the work ({reason}). What is finished is kept: when a cluster "
        "runs again, give the same command."
    )
