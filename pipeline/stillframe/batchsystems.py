"""Workers as jobs of a batch system, through dask-jobqueue: one process a job, replaced when it ends.

Each worker leaves by itself before its walltime is over, so that it hands back what it has not begun; whoever is
killed, preempted or cancelled is asked for again. Doors are closed: see :mod:`stillframe.doors`.
"""

import asyncio
import contextlib
import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillframe.doors import Keys, for_those_who_know, make_keys, secret
from stillframe.errors import RunStopped
from stillframe.jobs import Jobs, System
from stillframe.progress import log, say
from stillframe.surroundings import configuration, variables

_CLASSES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "sge": "SGECluster"}
_NO_REQUEUE = {"slurm": "--no-requeue", "pbs": "-r n", "lsf": "-rn", "sge": "-r n"}
"""A job that is started again would come in addition to the one that replaces it."""
_ACCOUNT = {"slurm": "account", "pbs": "account", "lsf": "project", "sge": "project"}
_LOOK = {
    "slurm": ("squeue", "--noheader", "--format=%A %T", "--jobs"),
    "pbs": ("qstat",),
    "lsf": ("bjobs",),
    "sge": ("qstat", "-j"),
}
"""Commands that tell of a job."""
_OVER = re.compile(r"\b(DONE|EXIT|COMPLETED|CANCELLED|FAILED|TIMEOUT|NODE_FAIL|PREEMPTED|OUT_OF_MEMORY|BOOT_FAIL)\b")
_UNKNOWN = re.compile("invalid job id|unknown job|has finished|do not exist|not found", re.IGNORECASE)
_WITH_COMMAS = ("slurm", "sge")
_ASK_EVERY, _ANSWERS_WITHIN, _LONGEST_PAUSE = 10.0, 10.0, 60
_TIME_FOR_NANNIES = {"distributed.deploy.lost-worker-timeout": "15s"}
"""Until a nanny has started its worker again."""
_SURE_AFTER = 20.0
"""Seconds after which a job that is over is one whose worker never connected; longer than dask's own patience."""
_MOST_ENDED = 2
"""How often each job may end before its worker connects, where no worker is there at all."""
_WITHOUT_SCHEDULER = 60
"""Seconds after which a worker whose driver is gone ends its job."""
_REPLACE = "2s"
"""Time between two looks whether there are as many workers as there should be."""


@contextlib.contextmanager
def started(jobs: Jobs, private: Path) -> Iterator[Any]:
    """Start a scheduler in this process and ask for the jobs; yield a client, with nobody connected yet perhaps.

    Raises
    ------
    RunStopped
        The batch system takes no such job.
    """
    import dask
    from distributed import Client

    _refuse_spaces(private)
    keys, word, phase = make_keys(private / "keys"), secret(), _Phase()
    kind = cluster_class(jobs.system)
    given = arguments(jobs, keys, word) | {"job_cls": _patient(kind.job_cls, phase)}
    with dask.config.set(configuration() | _TIME_FOR_NANNIES), kind(**given) as cluster:
        for_those_who_know(cluster.scheduler, word)
        try:
            _submit(cluster, jobs)
            phase.taken.set()
            _tell_pages(cluster.scheduler, word, private)
            with Client(cluster, security=keys.security()) as client:
                yield client
        finally:
            phase.ended.set()


def cluster_class(system: System) -> Any:
    """Return dask-jobqueue's class for a batch system.

    Raises
    ------
    RunStopped
        It is not installed.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        module = importlib.import_module("dask_jobqueue")
    except ModuleNotFoundError as error:
        raise RunStopped(
            f"--cluster {system} needs dask-jobqueue ({error}). Install it: pip install 'stillframe[cluster]'."
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)  # which that import replaces by one that ends without a word
    return getattr(module, _CLASSES[system])


def arguments(jobs: Jobs, keys: Keys, word: str) -> dict[str, Any]:
    """Return what dask-jobqueue is to be told."""
    lifetime, stagger = jobs.leaves_after
    leaving = ["--lifetime", f"{lifetime:.0f}s", "--lifetime-stagger", f"{stagger:.0f}s"]
    loopback = ["--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    known = {
        "queue": jobs.queue,
        _ACCOUNT[jobs.system]: jobs.account,
        "interface": jobs.interface,
    }
    scheduler = {"dashboard_address": "127.0.0.1:0", "http_prefix": f"/{word}/"}
    if where := jobs.driver_interface or jobs.interface:
        scheduler["interface"] = where
    return {
        "cores": 1,
        "processes": 1,
        "memory": f"{jobs.memory} GiB",
        "walltime": jobs.time,
        "job_extra_directives": [_NO_REQUEUE[jobs.system], *jobs.directives],
        "job_script_prologue": [*_environment(), *jobs.prologue],
        "worker_extra_args": [*leaving, *loopback],
        "death_timeout": _WITHOUT_SCHEDULER,
        "local_directory": f'"{jobs.scratch}"',
        "log_directory": str(jobs.log),
        "python": shlex.quote(jobs.python or sys.executable),
        "job_name": "stillframe",
        "protocol": "tls://",
        "security": keys.security(),
        "scheduler_options": scheduler,
        **{name: value for name, value in known.items() if value},
    }


def _environment() -> list[str]:
    """What suits a worker process, and no page but the scheduler's."""
    pages = "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'"
    return [*(f"export {name}={value}" for name, value in variables().items()), pages]


def _refuse_spaces(path: Path) -> None:
    if shlex.quote(str(path)) != str(path):
        raise ValueError(
            f"{path.parent} has characters that job scripts cannot hold. Choose an --out without spaces and signs."
        )


def _submit(cluster: Any, jobs: Jobs) -> None:
    """Ask for the jobs once, where an error is heard, and keep their number from then on."""
    try:
        for _ in range(jobs.jobs):
            cluster.worker_spec.update(cluster.new_worker_spec())
        cluster.sync(cluster._correct_state)
    except (RuntimeError, OSError) as error:
        raise RunStopped(
            f"{jobs.system} takes no such job: {_last_lines(error)}. Correct the file given as --cluster, or the "
            "settings; nothing is lost."
        ) from error
    cluster.adapt(minimum=jobs.jobs, maximum=jobs.jobs, interval=_REPLACE)
    log.info("asked %s for %d jobs of %g GiB and %s", jobs.system, jobs.jobs, jobs.memory, jobs.walltime)


@dataclass(frozen=True)
class _Phase:
    """How far a cluster is."""

    taken: threading.Event = field(default_factory=threading.Event)
    """The batch system took the first jobs."""
    ended: threading.Event = field(default_factory=threading.Event)
    """No more are needed."""


def _patient(job_class: Any, phase: _Phase) -> Any:
    """Return the same kind of job, which is asked for again while a batch system that took others does not answer.

    Else dask would take it for one that waits in the queue, for ever.
    """
    from distributed.core import Status

    class Patient(job_class):  # type: ignore[misc]
        async def _submit_job(self, script_filename: str) -> Any:
            pause = 1
            while True:
                try:
                    return await super()._submit_job(script_filename)
                except (RuntimeError, OSError) as error:
                    if phase.ended.is_set() or not phase.taken.is_set():
                        self.status = Status.failed
                        raise
                    log.warning("a worker could not be replaced, to be tried again: %s", _last_lines(error))
                await _sleep(pause, phase.ended)
                pause = min(2 * pause, _LONGEST_PAUSE)

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed  # which dask looks for in all that it made

    return Patient


async def _sleep(seconds: int, ended: threading.Event) -> None:
    """Wait, unless it is all over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not ended.is_set():
        await asyncio.sleep(0.5)


@dataclass
class Replacer:
    """Finds jobs that ended before their worker connected, of which dask never hears, so that others are asked for."""

    cluster: Any
    jobs: Jobs
    _over: dict[str, float] = field(default_factory=dict)
    _ended: int = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator["Replacer"]:
        """Look now and then, aside, whether there is work at the time or not."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), name="stillframe-jobs", daemon=True)
        watch.start()
        try:
            yield self
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_ASK_EVERY):
            there = len(self.cluster.scheduler_info["workers"])
            self._ended = 0 if there else self._ended
            if there < self.jobs.jobs:
                with contextlib.suppress(RuntimeError):  # what dask changes meanwhile is looked at the next time
                    self._replace()

    def refuse_hopeless(self, there: int) -> None:
        """Stop where nobody would ever come.

        Raises
        ------
        RunStopped
            One job after the other ended so, and not one worker is there.
        """
        if not there and self._ended >= _MOST_ENDED * self.jobs.jobs:
            raise RunStopped(
                f"{self._ended} jobs ended one after the other before their worker connected. {self.jobs.log} tells "
                f"why{_last_words(self.jobs.log)}. What is finished is kept."
            )

    def _replace(self) -> None:
        connected = {worker["name"] for worker in dict(self.cluster.scheduler_info["workers"]).values()}
        absent = {job.job_id: name for name, job in dict(self.cluster.workers).items() if name not in connected}
        numbers = [number for number in absent if number]
        over = _ended_of(self.jobs.system, numbers) if numbers else []
        now = time.monotonic()
        self._over = {number: self._over.get(number, now) for number in over}
        # Whatever was connected once, dask has taken note of by then.
        ended = [absent[number] for number, since in self._over.items() if now - since > _SURE_AFTER]
        if ended:
            self._ended += len(ended)
            log.warning("%d jobs ended before their worker connected; %s tells why", len(ended), self.jobs.log)
            self.cluster.loop.add_callback(self.cluster.scale_down, ended)


def _last_words(folder: Path | None) -> str:
    """Return the last line that a job said, if any did."""
    files = sorted(folder.glob("*.err"), key=lambda file: file.stat().st_mtime) if folder else []
    lines = files[-1].read_text(errors="replace").strip().splitlines() if files else []
    return f" ({lines[-1]})" if lines else ""


def _ended_of(system: System, numbers: list[str]) -> list[str]:
    """Ask the batch system which jobs are over; no answer is none."""
    listed = [",".join(numbers)] if system in _WITH_COMMAS else numbers
    try:
        command = [*_LOOK[system], *listed]
        told = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWERS_WITHIN, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if told.returncode and not _UNKNOWN.search(told.stderr + told.stdout):
        return []
    living = [line for line in told.stdout.splitlines() if not _OVER.search(line)]
    return [number for number in numbers if not any(re.search(rf"\b{number}\b", line) for line in living)]


def _last_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-3:])


def _tell_pages(scheduler: Any, word: str, private: Path) -> None:
    """Say how to look at dask's pages from elsewhere; not where others may read it, as logs."""
    port = scheduler.http_server.port
    tunnel = f"ssh -N -L {port}:127.0.0.1:{port} {os.environ.get('USER') or os.getuid()}@{socket.gethostname()}"
    words = f"dask's pages: {tunnel}\nthen http://127.0.0.1:{port}/{word}/status"
    (private / "pages").write_text(words + "\n")
    say(words if sys.stderr.isatty() else f"dask's pages: {private / 'pages'} tells how to see them")


def absent(jobs: Jobs) -> str:
    """Return what to say while no worker is there."""
    look = _LOOK[jobs.system][0]
    return f"'{look}' tells why jobs wait, and {jobs.log} why they ended. Stopping this loses nothing."
