"""Start workers as jobs of a batch system with dask-jobqueue: one process a job, replaced when it ends.

Each worker leaves before its walltime (the time limit of its job) is over, so that it hands back tasks that it has not
begun. Killed, preempted and cancelled workers are replaced. All connections use TLS.
"""

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

from stillframe.cluster.job_settings import JobSettings, System
from stillframe.cluster.security import Keys, make_keys, private_scratch, require_secret_prefix, secret
from stillframe.cluster.worker_environment import configuration, variables
from stillframe.errors import RunStopped
from stillframe.log import log, print_message

_NO_REQUEUE = {"slurm": "--no-requeue", "pbs": "-r n", "lsf": "-rn", "sge": "-r n"}
"""Directives against restarting a job, since dask-jobqueue submits another one in its place."""
_ACCOUNT = {"slurm": "account", "pbs": "account", "lsf": "project", "sge": "project"}
_QUEUE_COMMAND = {"slurm": "squeue", "pbs": "qstat", "lsf": "bjobs", "sge": "qstat"}
"""Commands that print the state of jobs."""
_ENDED = re.compile(r"\b(COMPLETED|CANCELLED|FAILED|TIMEOUT|NODE_FAIL|PREEMPTED|OUT_OF_MEMORY|BOOT_FAIL)\b")
_LOST_WORKER_TIMEOUT = {"distributed.deploy.lost-worker-timeout": "15s"}
"""Time in which a nanny restarts its worker process, before the job counts as lost."""
_ASK_EVERY, _ANSWERS_WITHIN = 10.0, 10.0
"""Seconds between two questions to Slurm, and until it must have answered."""
_SURE_AFTER = 20.0
"""Seconds after which the worker of an ended job counts as never connected; longer than the lost-worker timeout."""
_MOST_ENDED = 2
"""Number of times that each job may end before its worker connects, while no worker is there at all."""
_WITHOUT_SCHEDULER = 60
"""Seconds after which a worker without a driver ends its job."""
_SCRATCH = "stillframe_scratch"
"""Shell variable with the path of a worker's scratch folder."""
_REPLACE_EVERY = "2s"
"""Time between two counts of the workers."""


@contextlib.contextmanager
def started(asked: JobSettings, private: Path) -> Iterator[Any]:
    """Start a scheduler in this process and submit the jobs; yield a client, perhaps before a worker is connected."""
    import dask
    from distributed import Client

    if shlex.quote(str(private)) != str(private):
        raise ValueError(
            f"{private.parent} has characters that job scripts cannot hold. Choose an --out without spaces and signs."
        )
    keys, prefix = make_keys(private / "keys"), secret()
    kind = cluster_class(asked.system)
    given = arguments(asked, keys, prefix) | {"job_cls": _job_class(kind.job_cls)}
    with private_scratch(), dask.config.set(configuration() | _LOST_WORKER_TIMEOUT), kind(**given) as cluster:
        require_secret_prefix(cluster.scheduler, prefix)
        _submit(cluster, asked)
        _report_pages(cluster.scheduler, prefix, private)
        with Client(cluster, security=keys.security()) as client:
            yield client


def cluster_class(system: System) -> Any:
    """Return dask-jobqueue's class for a batch system."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        module = importlib.import_module("dask_jobqueue")
    except ModuleNotFoundError as error:
        raise RunStopped(
            f"--cluster {system} needs dask-jobqueue ({error}). Install it: pip install 'stillframe[cluster]'."
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)  # the import installs a handler that exits without a message
    return getattr(module, f"{system.upper()}Cluster")


def arguments(asked: JobSettings, keys: Keys, prefix: str) -> dict[str, Any]:
    """Return the arguments of dask-jobqueue's cluster class."""
    lifetime, stagger = asked.leaves_after
    leaving = ["--lifetime", f"{lifetime:.0f}s", "--lifetime-stagger", f"{stagger:.0f}s"]
    loopback = ["--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    optional = {"queue": asked.queue, _ACCOUNT[asked.system]: asked.account, "interface": asked.interface}
    scheduler = {"dashboard_address": "127.0.0.1:0", "http_prefix": f"/{prefix}/"}
    if interface := asked.driver_interface or asked.interface:
        scheduler["interface"] = interface
    return {
        "cores": 1,
        "processes": 1,
        "memory": f"{asked.memory} GiB",
        "walltime": asked.time,
        "job_extra_directives": [_NO_REQUEUE[asked.system], *asked.directives],
        "job_script_prologue": _prologue(asked),
        "worker_extra_args": [*leaving, *loopback],
        "death_timeout": _WITHOUT_SCHEDULER,
        "local_directory": f'"${_SCRATCH}"',
        "log_directory": str(asked.log),
        "python": shlex.quote(asked.python or sys.executable),
        "job_name": "stillframe",
        "protocol": "tls://",
        "security": keys.security(),
        "scheduler_options": scheduler,
        **{name: value for name, value in optional.items() if value},
    }


def _prologue(asked: JobSettings) -> list[str]:
    """Return shell lines that set environment variables and make a scratch folder of mode 0700, until the job ends.

    Dask's own scratch folder has a predictable name, so that another user could make it first.
    """
    return [
        *(f"export {name}={value}" for name, value in variables().items()),
        "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'",  # a worker has no pages
        *asked.prologue,
        f'{_SCRATCH}=$(mktemp -d "{asked.scratch}/stillframe.XXXXXXXXXX") || exit 1',
        f"trap 'rm -rf \"${_SCRATCH}\"' EXIT",
    ]


def _job_class(base: Any) -> Any:
    """Return dask-jobqueue's class of one job, with submission errors logged and its end noted.

    Dask never retries a submission: a failed one would count as a job that waits in the queue, for ever. The failed
    status lets :class:`JobWatch` have it replaced.
    """
    from distributed.core import Status

    class Job(base):  # type: ignore[misc]
        async def _submit_job(self, script_filename: str) -> Any:
            try:
                return await super()._submit_job(script_filename)
            except (RuntimeError, OSError) as error:
                self.status = Status.failed
                reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][-3:])
                log.warning("a job could not be submitted: %s", reason)
                raise RuntimeError(reason) from error

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed  # dask asserts this status when the cluster closes

    return Job


def _submit(cluster: Any, asked: JobSettings) -> None:
    """Submit all jobs now, so that a refusal reaches the user; from then on replace each job that ends."""
    try:
        for _ in range(asked.jobs):
            cluster.worker_spec.update(cluster.new_worker_spec())
        cluster.sync(cluster._correct_state)
    except RuntimeError as error:
        raise RunStopped(
            f"{asked.system} takes no such job: {error}. Correct the file given as --cluster, or the settings; nothing "
            "is lost."
        ) from error
    cluster.adapt(minimum=asked.jobs, maximum=asked.jobs, interval=_REPLACE_EVERY)
    log.info("asked %s for %d jobs of %g GiB and %s", asked.system, asked.jobs, asked.memory, asked.walltime)


@dataclass
class JobWatch:
    """Thread that has jobs replaced that dask takes for waiting ones, for ever.

    These are jobs whose submission failed and, on Slurm, jobs that ended before their worker connected.
    """

    cluster: Any
    asked: JobSettings
    _ended_since: dict[str, float] = field(default_factory=dict)
    """Time since when Slurm reports jobs as ended, by their number."""
    _ended: int = 0
    """Jobs that ended before their worker connected, since a worker was last there."""

    @contextlib.contextmanager
    def watching(self) -> Iterator["JobWatch"]:
        """Watch the jobs in a thread of its own, also while no work is under way."""
        over = threading.Event()
        threading.Thread(target=self._watch, args=(over,), name="stillframe-jobs", daemon=True).start()
        try:
            yield self
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_ASK_EVERY):
            workers = len(self.cluster.scheduler_info["workers"])
            self._ended = 0 if workers else self._ended
            if workers < self.asked.jobs:
                with contextlib.suppress(RuntimeError):  # dask changed a dictionary during the look; the next one comes
                    self._replace()

    def refuse_hopeless(self) -> None:
        """Raise ``RunStopped`` if each job ended several times before its worker connected and no worker is there."""
        if self._ended >= _MOST_ENDED * self.asked.jobs and not self.cluster.scheduler_info["workers"]:
            raise RunStopped(
                f"{self._ended} jobs ended one after the other before their worker connected. {self.asked.log} tells "
                f"why{_last_error_line(self.asked.log)}. What is finished is kept."
            )

    def _replace(self) -> None:
        connected = {worker["name"] for worker in dict(self.cluster.scheduler_info["workers"]).values()}
        absent = {name: job.job_id for name, job in dict(self.cluster.workers).items() if name not in connected}
        numbers = [number for number in absent.values() if number]
        ended = ended_slurm_jobs(numbers) if numbers and self.asked.system == "slurm" else []
        now = time.monotonic()
        self._ended_since = {number: self._ended_since.get(number, now) for number in ended}
        # A job whose worker was connected once has left dask's list by that time.
        never_connected = {number for number, since in self._ended_since.items() if now - since > _SURE_AFTER}
        replaced = [name for name, number in absent.items() if not number or number in never_connected]
        if never_connected:
            self._ended += len(never_connected)
            log.warning("%d jobs ended before their worker connected; see %s", len(never_connected), self.asked.log)
        if replaced:
            self.cluster.loop.add_callback(self.cluster.scale_down, replaced)


def ended_slurm_jobs(numbers: list[str]) -> list[str]:
    """Return which of these jobs have ended according to ``squeue``; none if Slurm does not answer."""
    command = ["squeue", "--noheader", "--format=%A %T", "--jobs", ",".join(numbers)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWERS_WITHIN, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode and "Invalid job id" not in answer.stderr + answer.stdout:
        return []
    alive = {line.split()[0] for line in answer.stdout.splitlines() if line and not _ENDED.search(line)}
    return [number for number in numbers if number not in alive]


def _last_error_line(folder: Path | None) -> str:
    """Return the last line that any job printed as an error, in brackets; empty if there is none."""
    files = sorted(folder.glob("*.err"), key=lambda file: file.stat().st_mtime) if folder else []
    lines = files[-1].read_text(errors="replace").strip().splitlines() if files else []
    return f" ({lines[-1]})" if lines else ""


def _report_pages(scheduler: Any, prefix: str, private: Path) -> None:
    """Print how to open dask's pages from another machine. Logs may be read by others, so they name a file instead."""
    port = scheduler.http_server.port
    tunnel = f"ssh -N -L {port}:127.0.0.1:{port} {os.environ.get('USER') or os.getuid()}@{socket.gethostname()}"
    words = f"dask's pages: {tunnel}\nthen http://127.0.0.1:{port}/{prefix}/status"
    (private / "pages").write_text(words + "\n")
    print_message(words if sys.stderr.isatty() else f"dask's pages: {private / 'pages'} tells how to see them")


def advice_while_absent(asked: JobSettings) -> str:
    """Return the advice for users while no worker is connected."""
    command = _QUEUE_COMMAND[asked.system]
    return f"'{command}' tells why jobs wait, and {asked.log} why they ended. Stopping this loses nothing."
