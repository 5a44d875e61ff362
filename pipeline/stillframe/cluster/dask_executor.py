"""Executor on a dask cluster. The scheduler queues the tasks, retries them and replaces results of dead workers."""

import contextlib
import functools
import itertools
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stillframe.cluster.executors import ON_WORKER, Attempt, Item, Outcomes, Work, worker_of
from stillframe.cluster.worker_check import Requirements, refuse_unfit, unfit_workers
from stillframe.errors import RunStopped, WorkerUnfit
from stillframe.log import warn

_POLL = 0.1
"""Seconds between two checks of the stop event while no task ends."""
_COLLECT = 0.02
"""Seconds in which results are collected, as many are fetched and replaced at the cost of one."""
_WINDOW, _WINDOW_PER_WORKER = 500, 4
"""Tasks that are submitted and not yet fetched: at least the first number, and the second one for each worker. The
scheduler queues them; the limit keeps the driver's memory and the time to cancel flat in the number of units."""
_FETCHED_WITHIN = 30.0
"""Seconds after which fetching a result counts as failed; results are small."""
_COUNT_EVERY = 2.0
"""Seconds between two counts of the workers."""
_WITHOUT_WORKERS = 60.0
"""Seconds without a worker after which that is reported, or stops the run."""
_MOST_UNFIT = 8
"""Unfit workers that are dismissed before the run stops, if no other worker is there."""

_LOST = object()
"""Outcome of a task whose worker died before the result was fetched. The scheduler runs the task again."""


@dataclass(frozen=True)
class DaskExecutor:
    """Executor that works on items as tasks of a dask cluster."""

    client: Any
    """Client of the cluster."""
    memory: int
    """Memory of each worker, bytes."""
    stop: threading.Event
    """Ends the work as Ctrl-C does."""
    name: str
    """Name in the log, such as "4 workers"."""
    workers: int
    """Threads of all workers, as asked for at the start."""
    check: Callable[[], None] = lambda: None
    """Called while no worker is connected; raises ``RunStopped`` if none would ever come."""
    patient: bool = True
    """Whether to wait for workers without end when none is left."""
    required: Requirements | None = None
    """Requirements that workers must meet; None for workers that the driver started from its own environment."""
    absent: str = "Start workers; or stop this, which loses nothing."
    """Advice while no worker is connected."""

    def once(self, work: Work[Item], attempts: Iterable[Attempt[Item]], *, alone: bool) -> Outcomes[Item]:
        """Yield each item with its result or its exception, as tasks end; run one item at a time if ``alone``."""
        waiting = iter(attempts)
        window = 1 if alone else max(_WINDOW, _WINDOW_PER_WORKER * self.workers)
        # Dask's scheduler holds back tasks of one large group only, and takes the group from the keys.
        keys = zip(itertools.repeat(f"stillframe-{secrets.token_hex(4)}"), itertools.count())
        running: dict[Any, Attempt[Item]] = {}
        workers = _Workers(self)
        # Instead of as_completed, which blocks until a task ends and would not notice a stop.
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def submit(some: list[Attempt[Item]]) -> None:
            for future, attempt in self._submit(work, some, keys, retries=0 if alone else 1):
                running[future] = attempt
                future.add_done_callback(ended.put)

        submit(list(itertools.islice(waiting, window)))
        try:
            while running:
                finished, repeated = [], []
                for future, outcome in self._outcomes(self._next(ended, workers)):
                    if outcome is _LOST:
                        future.add_done_callback(ended.put)
                        continue
                    attempt = running.pop(future)
                    if isinstance(outcome, WorkerUnfit):
                        workers.dismiss(worker_of(outcome), outcome)
                        repeated.append(attempt)
                    else:
                        finished.append((attempt.item, outcome))
                room = window - len(running) - len(repeated)
                submit([*repeated, *itertools.islice(waiting, room)])
                yield from finished
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self.client.cancel(list(running))

    def _submit(
        self, work: Work[Item], attempts: list[Attempt[Item]], keys: Iterator[Any], retries: int
    ) -> Iterator[tuple[Any, Attempt[Item]]]:
        """Yield each future with its attempt; one message submits all tasks that may run on any worker."""
        task = functools.partial(_run_on_worker, work, self.required)
        anywhere = [attempt for attempt in attempts if not attempt.failed_on]
        try:
            if anywhere:
                names = list(itertools.islice(keys, len(anywhere)))
                items = [attempt.item for attempt in anywhere]
                yield from zip(self.client.map(task, items, key=names, retries=retries), anywhere, strict=True)
            for attempt in attempts:
                if attempt.failed_on:
                    # Another worker is preferred, if there is one.
                    others = [worker for worker in self.client.nthreads() if worker != attempt.failed_on]
                    place = {"workers": others, "allow_other_workers": True} if others else {}
                    yield self.client.submit(task, attempt.item, key=next(keys), retries=retries, **place), attempt
        except (
            Exception
        ) as error:  # work and items are plain objects: an exception here means that the client is closed
            raise _scheduler_gone(error) from error

    def _next(self, ended: "queue.SimpleQueue[Any]", workers: "_Workers") -> list[Any]:
        """Return the next futures that ended; raise ``KeyboardInterrupt`` on a stop."""
        while not self.stop.is_set():
            workers.look()
            with contextlib.suppress(queue.Empty):
                first = ended.get(timeout=_POLL)
                time.sleep(_COLLECT)
                return [first, *(ended.get() for _ in range(ended.qsize()))]
        raise KeyboardInterrupt

    def _outcomes(self, futures: list[Any]) -> list[tuple[Any, Any]]:
        """Return each future with its result or exception; fetch in one request if all tasks succeeded."""
        if len(futures) > 1 and all(future.status == "finished" for future in futures):
            with contextlib.suppress(Exception):  # then one by one, to see whose result cannot be fetched
                gather = functools.partial(self.client.gather, futures, asynchronous=True)
                return list(zip(futures, self.client.sync(gather, callback_timeout=_FETCHED_WITHIN), strict=True))
        return [(future, _outcome(future)) for future in futures]


@dataclass
class _Workers:
    """Watches the workers of a cluster: dismisses unfit ones, so that others come, and reports if none is there.

    The driver asks workers that connect later, since one without this package could not run a check of its own; dask
    would leave it registered, with tasks that it never runs, if it failed to import a ``WorkerPlugin``.
    """

    cluster: DaskExecutor
    _checked: set[str] = field(default_factory=set)
    _dismissed: set[str] = field(default_factory=set)
    _counted: float = -math.inf
    _absent_since: float = field(default_factory=time.monotonic)
    _patience: float = field(default_factory=lambda: _WITHOUT_WORKERS)

    def look(self) -> None:
        """Count the workers now and then, and check those that are new."""
        client, now = self.cluster.client, time.monotonic()
        if client.status != "running" or now - self._counted < _COUNT_EVERY:
            return
        self._counted = now
        try:
            workers = list(client.nthreads())
            self._check([address for address in workers if address not in self._checked])
        except OSError:  # the scheduler is gone; the tasks are going to report it
            return
        if workers:
            self._absent_since, self._patience = now, _WITHOUT_WORKERS
            return
        self.cluster.check()
        if now - self._absent_since > self._patience:
            self._patience *= 10
            self._report_absence()

    def _check(self, new: list[str]) -> None:
        self._checked.update(new)
        if new and self.cluster.required:
            for address, reason in unfit_workers(self.cluster.client, self.cluster.required, new).items():
                if reason:
                    self.dismiss(address, reason)

    def dismiss(self, address: str, reason: object) -> None:
        """Close an unfit worker. Raise ``RunStopped`` if many were dismissed and no other worker is there."""
        if address in self._dismissed:
            return
        self._dismissed.add(address)
        if len(self._dismissed) > _MOST_UNFIT and not set(self.cluster.client.nthreads()) - self._dismissed:
            raise RunStopped(f"one worker after the other is not fit for this run, the last one too: {reason}")
        warn(f"worker {address} is sent away: {reason}")
        self.cluster.client.retire_workers([address], close_workers=True)

    def _report_absence(self) -> None:
        if not self.cluster.patient:
            raise RunStopped(
                "all worker processes ended and do not come back; the run's log tells more. What is finished is kept: "
                "give the same command again, with fewer --workers or more --memory if they ran out of it."
            )
        warn(f"no worker is connected: waiting. {self.cluster.absent}")


def _run_on_worker(work: Work[Item], required: Requirements | None, item: Item) -> Any:
    """Apply the work to an item if this worker is fit; an exception gets a note with the worker's address."""
    from distributed import get_worker

    worker: Any = get_worker()
    try:
        if required:
            refuse_unfit(required, worker.local_directory)
        return work(item)
    except Exception as error:
        error.add_note(f"{ON_WORKER}{worker.address}")
        raise


def _outcome(future: Any) -> Any:
    """Return the result or the exception of a task that ended, or ``_LOST``."""
    try:
        if future.status == "finished":
            return future.result(timeout=_FETCHED_WITHIN)
    except Exception as error:  # of fetching; or of a second run, if the worker died and the scheduler ran it again
        if future.status == "finished" and future.client.status == "running":
            return RuntimeError(
                f"its result could not be fetched from the worker ({type(error).__name__}: {error}): are the same "
                "versions of everything installed there and here?"
            )
    if future.status == "error":
        return future.exception()
    if future.status in ("lost", "pending") and future.client.status == "running":
        return _LOST
    raise _scheduler_gone(future.status)


def _scheduler_gone(reason: object) -> RunStopped:
    return RunStopped(
        f"the dask scheduler is gone or dropped the work ({reason}). What is finished is kept: when a cluster "
        "runs again, give the same command."
    )
