"""Workers are started or joined here: on this machine, as jobs of a batch system, or on a running dask cluster."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from stillframe.batchsystems import Replacer, absent, started
from stillframe.doors import (
    Keys,
    for_those_who_know,
    known_keys,
    private_folder,
    refuse_foreign,
    secret,
    warn_of_open_door,
)
from stillframe.durable import make_folder
from stillframe.executors import Executor, InProcess, OnCluster
from stillframe.jobs import Jobs, read_jobs, with_settings
from stillframe.progress import log, warn
from stillframe.settings import Settings
from stillframe.surroundings import configuration, variables
from stillframe.workers import demands_of, refuse_unfit_workers

_DASK_LOGS = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
_WAIT_FOR_FILE = 60.0
"""Seconds in which a scheduler started beside this run writes its file."""
_PATIENCE = 20
"""Seconds in which a scheduler answers."""
_FIRST_LOOK = 1.0
_TELL_EVERY = 60.0
"""Seconds between two words about workers that are waited for."""


@contextlib.contextmanager
def executor(settings: Settings, client: Any, stop: threading.Event, home: Path | None = None) -> Iterator[Executor]:
    """Give the executor that the settings ask for, which ends as by Ctrl-C on the event; close what was started.

    A folder that all machines share holds what they need to find each other: by default the run's own.

    Raises
    ------
    ConnectionError
        No scheduler answers at the address, or in the file, that was given.
    WorkerUnfit
        A worker there lacks what the run needs.
    """
    if client is None and not settings.scheduler and settings.workers == 0:
        yield InProcess(_per_worker(settings, 1), stop)
        return
    home = home or settings.out
    with _logs_aside(), contextlib.ExitStack() as stack:
        if client is not None:
            yield stack.enter_context(_joined(client, settings, stop, home))
        elif settings.scheduler:
            remote = stack.enter_context(_connect(settings))
            yield stack.enter_context(_joined(remote, settings, stop, home))
        elif settings.cluster in (None, "local"):
            yield stack.enter_context(_local(settings, stop))
        else:
            yield stack.enter_context(_batch(read_jobs(str(settings.cluster)), settings, stop, home))


@contextlib.contextmanager
def _joined(client: Any, settings: Settings, stop: threading.Event, home: Path) -> Iterator[OnCluster]:
    """Use a cluster that runs already, when its workers are found fit."""
    warn_of_open_door(client.scheduler_info()["address"])
    _wait_for_workers(client, stop, OnCluster.absent, lambda _: None)
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    shares = [worker["memory_limit"] // worker["nthreads"] for worker in workers if worker["memory_limit"]]
    memory = int(settings.memory * 2**30) if settings.memory else min(shares, default=_per_worker(settings, cores()))
    with _private(home) as folder:
        demands = demands_of(settings.frames, folder)
        refuse_unfit_workers(client, demands)
        threads = sum(worker["nthreads"] for worker in workers)
        yield replace(_on(client, memory, stop, threads), demands=demands)


@contextlib.contextmanager
def _batch(jobs: Jobs, settings: Settings, stop: threading.Event, home: Path) -> Iterator[OnCluster]:
    """Start workers as jobs of a batch system, and go on with the first that comes."""
    with _private(home) as folder:
        jobs = with_settings(jobs, settings, settings.out / "jobs" if home == settings.out else folder)
        with started(jobs, folder) as client, Replacer(client.cluster, jobs).watching() as replacer:
            _wait_for_workers(client, stop, absent(jobs), replacer.refuse_hopeless)
            demands = demands_of(settings.frames, folder)
            refuse_unfit_workers(client, demands, some=True)
            cluster = _on(client, int(jobs.memory * 2**30), stop, jobs.jobs)
            yield replace(cluster, demands=demands, absent=absent(jobs), keep=replacer.refuse_hopeless)


@contextlib.contextmanager
def _private(home: Path) -> Iterator[Path]:
    make_folder(home)
    with private_folder(home) as folder:
        yield folder


def _wait_for_workers(client: Any, stop: threading.Event, advice: str, keep: Callable[[int], None]) -> None:
    """Wait for the first worker, however long a queue is, and say so now and then."""
    told, pause = time.monotonic(), 0.05
    while not client.nthreads():
        if stop.wait(pause):
            raise KeyboardInterrupt
        keep(0)
        pause = min(2 * pause, _FIRST_LOOK)
        if time.monotonic() - told > _TELL_EVERY:
            told = time.monotonic() + 9 * _TELL_EVERY
            warn(f"no worker is connected yet: waiting. {advice}")


def _on(client: Any, memory: int, stop: threading.Event, workers: int) -> OnCluster:
    return OnCluster(client, memory, stop, f"{workers} worker{'s' if workers > 1 else ''}", workers)


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


@contextlib.contextmanager
def _local(settings: Settings, stop: threading.Event) -> Iterator[OnCluster]:
    """One single-threaded worker process per core, reachable from this machine alone and with this session's key."""
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security

    workers, word = settings.workers or cores(), secret()
    memory = _per_worker(settings, workers)
    with dask.config.set(_LOCAL):  # until the end, for workers that come later
        with _deaf_to_interrupts():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=memory,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"http_prefix": f"/{word}/", "dashboard": False},
                protocol="tls://",
                security=Security.temporary(),
                silence_logs=logging.CRITICAL,
            )
        for_those_who_know(cluster.scheduler, word)

        def keep(there: int) -> None:
            """Bring back a worker that died while its nanny started it again, which nobody else does."""
            if there < workers:
                cluster.scale(workers)

        with cluster, Client(cluster) as client:
            yield replace(_on(client, memory, stop, workers), keep=keep, patient=False)


_LOCAL = {
    **configuration(),
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in variables().items()},
    "distributed.scheduler.allowed-failures": 1,
    "distributed.worker.http.routes": [],
    "distributed.deploy.lost-worker-timeout": "3s",
}


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
def _connect(settings: Settings) -> Iterator[Any]:
    """Connect to a scheduler by its address or its file."""
    scheduler = str(settings.scheduler)
    keys = known_keys(settings.certificates) if settings.certificates else None
    is_file = "://" not in scheduler and ("/" in scheduler or scheduler.endswith(".json"))
    try:
        client = _client_of_file(Path(scheduler), keys) if is_file else _client(keys, address=scheduler)
    except PermissionError:
        raise
    except (OSError, TimeoutError, ValueError, RuntimeError, TypeError) as error:
        raise ConnectionError(
            f"no dask scheduler answers at {scheduler} ({error}). Check the address or the scheduler file, that the "
            "cluster still runs, and for one with TLS that --certificates names the folder of its keys."
        ) from error
    with client:
        yield client


def _client(keys: Keys | None, **where: str) -> Any:
    from distributed import Client

    return Client(**where, timeout=_PATIENCE, **({"security": keys.security()} if keys else {}))


def _client_of_file(file: Path, keys: Keys | None) -> Any:
    """Connect to the scheduler of a file, which a job that starts beside this one may write only now."""
    until = time.monotonic() + _WAIT_FOR_FILE
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.2)
    if not file.exists():
        raise FileNotFoundError(f"no such file appeared within {_WAIT_FOR_FILE:g} s")
    refuse_foreign(file)
    return _client(keys, scheduler_file=str(file))
