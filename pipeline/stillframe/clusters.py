"""Where units are worked on: in this process, on local worker processes, or on a running dask cluster."""

import contextlib
import itertools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from stillframe.errors import RunStopped, hopeless
from stillframe.progress import warn
from stillframe.settings import Settings

log = logging.getLogger("stillframe")
_DASK_LOGS = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")

Item = TypeVar("Item")

_PROCESS_BYTES = 350 * 2**20
"""What a worker takes before it sees a frame: Python with its libraries, and compiled code."""
_SHARE = 0.7
"""Part of a worker's memory that units may fill, below where dask begins to spill and pause."""
_WAIT_FOR_FILE = 60.0
"""Seconds in which a scheduler started beside this run writes its file."""
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_ARENA_MAX": 1}
"""Lets worker processes use memory again that held a frame. By dask's default each one gets new pages, which the
kernel must clear: half of what decoding it takes."""

_POLL = 0.02
"""Seconds between two looks at what is done."""
_DOUBTFUL = 8
"""Failures without one success after which the fault is not taken to be the item's."""
_LOSSES = 3
"""How often a result may get lost before its item counts as failed."""
_RECOUNT = 2.0
"""Seconds between two counts of the workers."""
_WITHOUT_WORKERS = 60.0
"""Seconds without a result after which to look whether there are workers."""

_ON = "on worker "
_QUEUED = 2
"""Tasks given to each worker beyond the one it works on, so that it never waits."""


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
            again.append(Try(item, _where(outcome)))
        else:
            good += not isinstance(outcome, Exception)
            yield item, outcome
    for item, outcome in executor.once(work, again, alone=False):
        if is_killed(outcome):
            alone.append(Try(item))
        else:
            yield item, outcome
    yield from executor.once(work, alone, alone=True)


def _told_where(work: Callable[[Item], Any], item: Item) -> Any:
    """Do the work on a worker; what it raises says where that was."""
    from distributed import get_worker

    try:
        return work(item)
    except Exception as error:
        error.add_note(f"{_ON}{get_worker().address}")
        raise


def _where(error: Exception) -> str:
    """Return the address of the worker that raised an error, if it is known."""
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(_ON))
    return next((note.removeprefix(_ON) for note in notes), "")


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
    own: bool = False
    """Whether its workers were started here, so that nobody else brings them back."""

    def once(
        self, work: Callable[[Item], Any], tries: Iterable[Try[Item]], *, alone: bool
    ) -> Iterator[tuple[Item, Any]]:
        """Yield each item with its result, or with the exception it raised, as they come."""
        from distributed import as_completed

        waiting = iter(tries)
        tasks: dict[Any, Try[Item]] = {}
        done = as_completed()
        room = _Room(self.client, alone, self.workers if self.own else 0)

        def submit(some: Iterable[Try[Item]]) -> None:
            for attempt in some:
                future = self._submit(work, attempt, retries=0 if alone else 1)
                tasks[future] = attempt
                done.add(future)

        submit(itertools.islice(waiting, room.tasks()))
        try:
            while tasks:
                future = self._next(done, room)
                attempt, outcome = tasks.pop(future), _outcome(future)
                if outcome is _FORGOTTEN and attempt.lost < _LOSSES:
                    submit([replace(attempt, lost=attempt.lost + 1)])
                    continue
                yield attempt.item, _NOT_FETCHED if outcome is _FORGOTTEN else outcome
                submit(itertools.islice(waiting, max(0, room.tasks() - len(tasks))))
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self.client.cancel(list(tasks))

    def _submit(self, work: Callable[[Item], Any], attempt: Try[Item], retries: int) -> Any:
        try:
            place = self._elsewhere(attempt.failed_on) if attempt.failed_on else {}
            return self.client.submit(_told_where, work, attempt.item, pure=False, retries=retries, **place)
        except Exception as error:  # nothing but a closed client: what is sent is plain
            raise _lost(error) from error

    def _elsewhere(self, address: str) -> dict[str, Any]:
        """Ask for any worker but this one, unless it is the only one."""
        others = [worker for worker in self.client.nthreads() if worker != address]
        return {"workers": others, "allow_other_workers": True} if others else {}

    def _next(self, done: Any, room: "_Room") -> Any:
        """Wait for the next task to end, with an eye on a stop and on the workers."""
        until = time.monotonic() + _WITHOUT_WORKERS
        while not done.has_ready():
            if self.stop.wait(_POLL):
                raise KeyboardInterrupt
            room.tasks()
            if time.monotonic() > until:
                until += self._warn_of_no_workers()
        return next(done)

    def _warn_of_no_workers(self) -> float:
        """Say so if nobody is there to do the work; return when to look again."""
        if self.client.status != "running" or self.client.nthreads():
            return _WITHOUT_WORKERS
        if self.own and not self._come_back():
            raise RunStopped(
                "all worker processes ended and do not come back; the run's log tells more. What is finished is kept: "
                "give the same command again, with fewer --workers or more --memory if they ran out of it."
            )
        if not self.own:
            warn("no worker is connected: waiting. Start workers; or stop this, which loses nothing.")
        return 10 * _WITHOUT_WORKERS

    def _come_back(self) -> bool:
        """Give workers that are just being started again a while."""
        until = time.monotonic() + _WITHOUT_WORKERS
        while not self.client.nthreads() and time.monotonic() < until:
            if self.stop.wait(_RECOUNT):
                raise KeyboardInterrupt
        return bool(self.client.nthreads())


@dataclass
class _Room:
    """How many tasks may be under way: a few more than there are workers, who may come and go."""

    client: Any
    alone: bool
    own: int
    """Workers that were started here and are to be kept."""
    _counted: float = -math.inf
    _tasks: int = 1

    def tasks(self) -> int:
        """Return how many, after a look at the workers now and then."""
        if self.client.status == "running" and time.monotonic() - self._counted > _RECOUNT:
            self._counted = time.monotonic()
            try:
                there = sum(self.client.nthreads().values())
            except OSError:  # the scheduler is going; its tasks are going to say so
                return self._tasks
            self._tasks = 1 if self.alone else (1 + _QUEUED) * max(1, there)
            if there < self.own:
                self.client.cluster.scale(self.own)  # brings back one that died while its nanny started it again
        return self._tasks


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
    if status == "lost":
        return _FORGOTTEN
    if status != "finished":
        raise _lost(status)
    try:
        return future.result()
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


@contextlib.contextmanager
def executor(settings: Settings, client: Any, stop: threading.Event) -> Iterator[Executor]:
    """Give the executor that the settings ask for, which ends as by Ctrl-C on the event; close what was started.

    Raises
    ------
    ConnectionError
        No scheduler answers at the address, or in the file, that was given.
    """
    if client is not None:
        yield _on(client, settings, stop)
    elif settings.scheduler:
        with _logs_aside(), _connect(settings.scheduler) as remote:
            yield _on(remote, settings, stop)
    elif settings.workers == 0:
        yield InProcess(_per_worker(settings, 1), stop)
    else:
        with _logs_aside(), _local(settings) as local:
            yield replace(_on(local, settings, stop), own=True)


@contextlib.contextmanager
def _logs_aside() -> Iterator[None]:
    """Let what dask says of workers that come and go be read in the run's log, and not between people's own lines."""
    import distributed  # noqa: F401  it sets up its logs when it is imported

    loggers = [logging.getLogger(name) for name in _DASK_LOGS]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_Forward(logging.WARNING)], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


class _Forward(logging.Handler):
    """Hands on to this package's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it as one's own, if it is going to be kept."""
        if log.handlers:
            log.log(record.levelno, "%s: %s", record.name, record.getMessage())


def cores() -> int:
    """Return how many cores this machine, container or job allows."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def _per_worker(settings: Settings, workers: int) -> int:
    """Bytes of a local worker, within what this machine, container or job allows."""
    from distributed.system import MEMORY_LIMIT

    return int(settings.memory * 2**30) if settings.memory else int(0.9 * MEMORY_LIMIT / workers)


def unit_budget(executor: Executor) -> int:
    """Bytes that one unit may take on each worker."""
    return int(_SHARE * executor.memory) - _PROCESS_BYTES


def process_memory(unit_bytes: int) -> int:
    """Bytes that a worker process takes with a unit of so many."""
    return _PROCESS_BYTES + unit_bytes


@contextlib.contextmanager
def _local(settings: Settings) -> Iterator[Any]:
    """One single-threaded worker process per core, reachable from this machine alone."""
    import dask
    from distributed import Client, LocalCluster

    workers = settings.workers or cores()
    with (
        _deaf_to_interrupts(),
        dask.config.set(
            {f"distributed.nanny.pre-spawn-environ.{k}": v for k, v in _MALLOC.items()}
            | {"distributed.scheduler.allowed-failures": 1}
        ),
    ):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=_per_worker(settings, workers),
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
            silence_logs=logging.CRITICAL,
        )
    soon = dask.config.set({"distributed.deploy.lost-worker-timeout": "3s"})
    with soon, cluster, Client(cluster) as client:
        yield client


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let threads and processes started here never see Ctrl-C: the driver hears it, now or when they are started.

    They inherit the mask of blocked signals, and so do workers that are started again later. The tracker of
    multiprocessing's resources, which takes that mask off where it is started, runs before.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _connect(scheduler: str) -> Iterator[Any]:
    from distributed import Client

    is_file = "://" not in scheduler and ("/" in scheduler or scheduler.endswith(".json"))
    try:
        client = _client_of_file(Path(scheduler)) if is_file else Client(scheduler, timeout=20)
    except (OSError, TimeoutError, ValueError) as error:
        raise ConnectionError(
            f"no dask scheduler answers at {scheduler} ({error}). Check the address or the scheduler file, and that "
            "the cluster still runs."
        ) from error
    with client:
        yield client


def _client_of_file(file: Path) -> Any:
    """Connect to the scheduler of a file, which a job that starts beside this one may write only now."""
    from distributed import Client

    until = time.monotonic() + _WAIT_FOR_FILE
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.2)
    if not file.exists():
        raise FileNotFoundError(f"no such file appeared within {_WAIT_FOR_FILE:g} s")
    return Client(scheduler_file=str(file), timeout=20)


def _on(client: Any, settings: Settings, stop: threading.Event) -> OnCluster:
    client.wait_for_workers(1, timeout=300)
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    shares = [worker["memory_limit"] // worker["nthreads"] for worker in workers if worker["memory_limit"]]
    memory = int(settings.memory * 2**30) if settings.memory else min(shares, default=_per_worker(settings, cores()))
    threads = sum(worker["nthreads"] for worker in workers)
    return OnCluster(client, memory, stop, f"{threads} worker{'s' if threads > 1 else ''}", threads)
