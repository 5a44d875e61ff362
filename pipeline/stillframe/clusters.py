"""Where units are worked on: in this process, on local worker processes, or on a running dask cluster."""

import contextlib
import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from stillframe.errors import RunStopped
from stillframe.settings import Settings

Item = TypeVar("Item")

_PROCESS_BYTES = 350 * 2**20
"""What a worker takes before it sees a frame: Python with its libraries."""
_SHARE = 0.7
"""Part of a worker's memory that units may fill, below where dask begins to spill and pause."""
_WAIT_FOR_FILE = 60.0
"""Seconds in which a scheduler started beside this run writes its file."""
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_ARENA_MAX": 1}
"""Lets worker processes use memory again that held a frame. By dask's default each one gets new pages, which the
kernel must clear: half of what decoding it takes."""

_QUEUED = 2
"""Tasks given to each worker beyond the one it works on, so that it never waits."""


class Executor(Protocol):
    """Something that applies a function to items and gives the results as they come."""

    @property
    def budget(self) -> int:
        """Bytes that one unit may take."""
        ...

    @property
    def name(self) -> str:
        """What to call it in the log."""
        ...

    @property
    def many(self) -> bool:
        """Whether several processes may work at a time."""
        ...

    def results(self, work: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yield each item with its result, or with the exception it raised, in any order."""
        ...


@dataclass(frozen=True)
class InProcess:
    """One item after the other, here."""

    budget: int
    name: str = "this process"
    many: bool = False

    def results(self, work: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yield each item with its result, or with the exception it raised, in order."""
        for item in items:
            try:
                yield item, work(item)
            except Exception as error:  # reported with its unit; the others go on
                yield item, error


@dataclass(frozen=True)
class OnCluster:
    """A dask cluster; a few tasks more than it has threads are under way at a time."""

    client: Any
    budget: int
    name: str
    many: bool = True

    def results(self, work: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yield each item with its result, or with the exception it raised, as they come."""
        from distributed import as_completed

        waiting = iter(items)
        tasks: dict[Any, Item] = {}
        done = as_completed()

        def submit(count: int) -> None:
            for item in itertools.islice(waiting, count):
                try:
                    future = self.client.submit(work, item, pure=False, retries=1)
                except Exception as error:  # nothing but a closed client: what is sent is plain
                    raise _lost(error) from error
                tasks[future] = item
                done.add(future)

        submit((1 + _QUEUED) * max(1, sum(self.client.nthreads().values())))
        try:
            for future in done:
                yield tasks.pop(future), _outcome(future)
                submit(1)
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                self.client.cancel(list(tasks))


def _outcome(future: Any) -> Any:
    """Return what a task returned or raised; a task that was lost with its scheduler stops the run."""
    if future.status == "error":
        return future.exception()
    if future.status != "finished":
        raise _lost(future.status)
    try:
        return future.result()
    except Exception as error:  # the task raised nothing, so that its result could not be fetched
        raise _lost(error) from error


def _lost(reason: object) -> RunStopped:
    return RunStopped(
        f"the dask scheduler is gone or dropped the work ({reason}). What is finished is kept: when a cluster "
        "runs again, give the same command."
    )


@contextlib.contextmanager
def executor(settings: Settings, client: Any = None) -> Iterator[Executor]:
    """Give the executor that the settings ask for, and close what was started.

    Raises
    ------
    ConnectionError
        No scheduler answers at the address, or in the file, that was given.
    """
    if client is not None:
        yield _on(client, settings)
    elif settings.scheduler:
        with _connect(settings.scheduler) as remote:
            yield _on(remote, settings)
    elif settings.workers == 0:
        yield InProcess(_budget(_per_worker(settings, 1)))
    else:
        with _local(settings) as local:
            yield _on(local, settings)


def cores() -> int:
    """Return how many cores this machine, container or job allows."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def _per_worker(settings: Settings, workers: int) -> int:
    """Bytes of a local worker, within what this machine, container or job allows."""
    from distributed.system import MEMORY_LIMIT

    return int(settings.memory * 2**30) if settings.memory else int(0.9 * MEMORY_LIMIT / workers)


def _budget(memory: int) -> int:
    return int(_SHARE * memory) - _PROCESS_BYTES


@contextlib.contextmanager
def _local(settings: Settings) -> Iterator[Any]:
    """One single-threaded worker process per core, reachable from this machine alone."""
    import dask
    from distributed import Client, LocalCluster

    workers = settings.workers or cores()
    with (
        _deaf_to_interrupts(),
        dask.config.set({f"distributed.nanny.pre-spawn-environ.{k}": v for k, v in _MALLOC.items()}),
    ):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=_per_worker(settings, workers),
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
            silence_logs=logging.ERROR,
        )
    with cluster, Client(cluster) as client:
        yield client


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let processes started here inherit that Ctrl-C is ignored: the driver hears it and stops them in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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


def _on(client: Any, settings: Settings) -> OnCluster:
    client.wait_for_workers(1, timeout=300)
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    shares = [worker["memory_limit"] // worker["nthreads"] for worker in workers if worker["memory_limit"]]
    memory = int(settings.memory * 2**30) if settings.memory else min(shares, default=_per_worker(settings, cores()))
    threads = sum(worker["nthreads"] for worker in workers)
    return OnCluster(client, _budget(memory), f"{threads} worker{'s' if threads > 1 else ''}")
