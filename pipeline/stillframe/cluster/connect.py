"""Start or join the workers of a run: on this machine, as jobs of a batch system, or on a running dask cluster."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from stillframe.cluster.dask_executor import DaskExecutor
from stillframe.cluster.executors import Executor, InProcess
from stillframe.cluster.job_settings import read_job_settings, with_run_settings
from stillframe.cluster.jobqueue import JobWatch, advice_while_absent, started
from stillframe.cluster.security import (
    Keys,
    known_keys,
    private_folder,
    private_scratch,
    refuse_foreign,
    require_secret_prefix,
    secret,
    warn_without_tls,
)
from stillframe.cluster.worker_check import refuse_unfit_cluster, requirements
from stillframe.cluster.worker_environment import configuration, environment
from stillframe.log import log, warn
from stillframe.settings import Settings

_DASK_LOGS = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")
_WAIT_FOR_FILE = 60.0
"""Seconds in which a scheduler that starts at the same time as the run must write its file."""
_SCHEDULER_ANSWERS_WITHIN = 20
"""Seconds in which a scheduler must answer."""
_LONGEST_PAUSE = 1.0
"""Seconds between two checks whether a worker is there."""
_REPORT_EVERY = 60.0
"""Seconds until the first message about workers that are waited for; later messages come ten times as seldom."""
_WORKERS_REPLACED_EVERY = "2s"
"""Time between two counts of the local workers."""


@contextlib.contextmanager
def executor(settings: Settings, client: Any, stop: threading.Event, home: Path | None = None) -> Iterator[Executor]:
    """Yield the executor that the settings ask for, and close at the end what was started.

    The event ends the work as Ctrl-C does. ``home`` is a folder that all machines share, for the files by which they
    find each other; by default the run's own.
    """
    if client is None and not settings.scheduler and settings.workers == 0:
        yield InProcess(_memory_per_worker(settings, 1), stop)
        return
    home = home or settings.out
    with _logs_of_dask_redirected(), contextlib.ExitStack() as stack:
        if client is None and settings.scheduler:
            client = stack.enter_context(_connect(settings))
        if client is not None:
            yield stack.enter_context(_joined(client, settings, stop, home))
        elif settings.cluster in (None, "local"):
            yield stack.enter_context(_local(settings, stop))
        else:
            yield stack.enter_context(_batch(settings, stop, home))


@contextlib.contextmanager
def _joined(client: Any, settings: Settings, stop: threading.Event, home: Path) -> Iterator[DaskExecutor]:
    """Use a cluster that runs already, if all its workers are fit."""
    warn_without_tls(client.scheduler_info()["address"])
    _wait_for_workers(client, stop, DaskExecutor.absent, lambda: None)
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [worker["memory_limit"] // worker["nthreads"] for worker in workers if worker["memory_limit"]]
    default = min(limits, default=_memory_per_worker(settings, cores()))
    memory = int(settings.memory * 2**30) if settings.memory else default
    threads = sum(worker["nthreads"] for worker in workers)
    with private_folder(home) as folder:
        required = requirements(settings.frames, folder)
        refuse_unfit_cluster(client, required)
        yield _executor_on(client, memory, stop, threads, required=required)


@contextlib.contextmanager
def _batch(settings: Settings, stop: threading.Event, home: Path) -> Iterator[DaskExecutor]:
    """Start workers as jobs of a batch system, and begin as soon as the first one is there."""
    asked = read_job_settings(str(settings.cluster))
    with private_folder(home) as folder:
        asked = with_run_settings(asked, settings, settings.out / "jobs" if home == settings.out else folder)
        advice = advice_while_absent(asked)
        with started(asked, folder) as client, JobWatch(client.cluster, asked).watching() as watch:
            _wait_for_workers(client, stop, advice, watch.refuse_hopeless)
            required = requirements(settings.frames, folder)
            refuse_unfit_cluster(client, required, some=True)
            options = {"required": required, "absent": advice, "check": watch.refuse_hopeless}
            yield _executor_on(client, int(asked.memory * 2**30), stop, asked.jobs, **options)


def _wait_for_workers(client: Any, stop: threading.Event, advice: str, check: Callable[[], None]) -> None:
    """Wait for the first worker without a limit, since queues may be long; report that now and then."""
    reported, pause = time.monotonic(), 0.05
    while not client.nthreads():
        if stop.wait(pause):
            raise KeyboardInterrupt
        check()
        pause = min(2 * pause, _LONGEST_PAUSE)
        if time.monotonic() - reported > _REPORT_EVERY:
            reported = time.monotonic() + 9 * _REPORT_EVERY
            warn(f"no worker is connected yet: waiting. {advice}")


def _executor_on(client: Any, memory: int, stop: threading.Event, workers: int, **options: Any) -> DaskExecutor:
    return DaskExecutor(client, memory, stop, f"{workers} worker{'s' if workers > 1 else ''}", workers, **options)


@contextlib.contextmanager
def _logs_of_dask_redirected() -> Iterator[None]:
    """Redirect dask's warnings about workers that come and go to the run's log, away from the terminal."""
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
    """Log handler that forwards records to this package's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Forward a record, if this package's log is kept anywhere."""
        if log.handlers:
            log.log(record.levelno, "%s: %s", record.name, record.getMessage())


def cores() -> int:
    """Return the number of cores that this machine, container or job allows."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def _memory_per_worker(settings: Settings, workers: int) -> int:
    """Return the memory of a local worker, bytes, within the limits of this machine, container or job."""
    from distributed.system import MEMORY_LIMIT

    return int(settings.memory * 2**30) if settings.memory else int(0.9 * MEMORY_LIMIT / workers)


@contextlib.contextmanager
def _local(settings: Settings, stop: threading.Event) -> Iterator[DaskExecutor]:
    """Start one single-threaded worker process for each core, with a scheduler that only this session can reach."""
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security

    workers, prefix = settings.workers or cores(), secret()
    memory = _memory_per_worker(settings, workers)
    # Until the end, since workers that died are started again.
    with private_scratch(), environment(), dask.config.set(_LOCAL):
        with _sigint_blocked():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=memory,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"http_prefix": f"/{prefix}/", "dashboard": False},
                protocol="tls://",
                security=Security.temporary(),
                silence_logs=logging.CRITICAL,
            )
        require_secret_prefix(cluster.scheduler, prefix)
        with cluster, Client(cluster) as client:
            # Replaces a worker that died while its nanny was starting it again.
            cluster.adapt(minimum=workers, maximum=workers, interval=_WORKERS_REPLACED_EVERY)
            yield _executor_on(client, memory, stop, workers, patient=False)


_LOCAL = {
    **configuration(),
    "distributed.scheduler.allowed-failures": 1,
    "distributed.worker.http.routes": [],
    "distributed.deploy.lost-worker-timeout": "3s",
}


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT while threads and worker processes start, so that Ctrl-C reaches the driver alone.

    Threads and processes inherit the mask of blocked signals, also workers that are started again later. The resource
    tracker of multiprocessing is started before, since its start unblocks SIGINT.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _connect(settings: Settings) -> Any:
    """Return a client of the scheduler whose address or file the settings name."""
    scheduler = str(settings.scheduler)
    keys = known_keys(settings.certificates) if settings.certificates else None
    is_file = "://" not in scheduler and ("/" in scheduler or scheduler.endswith(".json"))
    try:
        return _client_of_file(Path(scheduler), keys) if is_file else _client(keys, address=scheduler)
    except PermissionError:
        raise
    except (OSError, TimeoutError, ValueError, RuntimeError, TypeError) as error:
        raise ConnectionError(
            f"no dask scheduler answers at {scheduler} ({error}). Check the address or the scheduler file, that the "
            "cluster still runs, and for one with TLS that --certificates names the folder of its keys."
        ) from error


def _client(keys: Keys | None, **where: str) -> Any:
    from distributed import Client

    return Client(**where, timeout=_SCHEDULER_ANSWERS_WITHIN, **({"security": keys.security()} if keys else {}))


def _client_of_file(file: Path, keys: Keys | None) -> Any:
    """Return a client of the scheduler that wrote a file. The scheduler may be starting now, so wait for the file."""
    until = time.monotonic() + _WAIT_FOR_FILE
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.2)
    if not file.exists():
        raise FileNotFoundError(f"no such file appeared within {_WAIT_FOR_FILE:g} s")
    refuse_foreign(file)
    return _client(keys, scheduler_file=str(file))
