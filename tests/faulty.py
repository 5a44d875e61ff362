"""What the tests of faults share: runs as processes, what they leave, and how to disturb them."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import psutil

import stillframe as sf
from stillframe.workflow.driver import run
from synthetic import contents

STORES = ("shifts.zarr", "aligned.zarr", "reference.zarr")
SMALL = {"unit_frames": 4, "max_shift": 12, "reference_iterations": 1}
PATIENCE = 300
"""Seconds that a process may take while others compile beside it on a machine of two cores."""
LONG = os.environ.get("STILLFRAME_FAULTS") == "long"


def settings(stored, out, **options):
    """Settings of a small run in this process."""
    fields = {"frames": stored[0], "mask": stored[1], "out": out, "workers": 0} | SMALL
    return sf.Settings(**(fields | options))


def command(*arguments):
    return [sys.executable, "-m", "stillframe", *map(str, arguments)]


def run_command(stored, out, *more, **options):
    """The same run as a command."""
    values = {"mask": stored[1], "out": out} | SMALL | options
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    return command("run", stored[0], *flags, *more)


class Started:
    """A command in a process group of its own; what it says goes to a file, which outlives whoever holds a pipe."""

    unended: ClassVar[list["Started"]] = []
    """Those that a test has not waited for; a fixture kills them where it failed before."""

    def __init__(self, arguments, **options):
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed at the end
        self.process = subprocess.Popen(
            arguments, start_new_session=True, stdout=self._told, stderr=self._told, text=True, **options
        )
        self.pid = self.process.pid
        self.unended.append(self)

    def poll(self):
        return self.process.poll()

    def end(self, patience=PATIENCE):
        """Wait for it; return its status and its words."""
        status = self.process.wait(patience)
        self.unended.remove(self)
        self._told.seek(0)
        words = self._told.read()
        self._told.close()
        return status, words

    def kill(self, *, group):
        """Kill it, alone or with all that it started; tell whether it was still at work."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL) if group else os.kill(self.pid, signal.SIGKILL)
        return self.end()[0] != 0


def stores(folder):
    """Every byte of the results."""
    return {name: contents(folder / name) for name in STORES}


def records(folder):
    """What tells whether a record was written again."""
    seen = {}
    for path in folder.glob("units/*/[0-9]*.json"):
        try:
            seen[path] = (path.stat().st_mtime_ns, path.stat().st_ino)
        except FileNotFoundError:
            continue
    return seen


def wait_for(condition, process=None, patience=PATIENCE, pause=0.002):
    """Wait until something holds, or the process ends; tell whether it held."""
    until = time.monotonic() + patience
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("it never happened")
        if process is not None and process.poll() is not None:
            return bool(condition())
        time.sleep(pause)
    return True


def wait_for_work(process, out, chance, most):
    """Wait until a run has begun and so many records are new, by chance, and a little longer."""
    seen = set(records(out).items())
    wait_for(lambda: (out / ".drafts").is_dir(), process)
    wanted = chance.randrange(1, most)
    wait_for(lambda: len(set(records(out).items()) - seen) >= wanted, process)
    time.sleep(chance.random() * 0.05)


def worker_processes(pid):
    """Processes that work for a driver or a nanny, and nothing else."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def kill(processes):
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


def finish(stored, out, **options):
    """Give the command again, here."""
    return run(settings(stored, out, **options))


def chances(seed):
    return random.Random(seed)


class Cluster:
    """A scheduler and workers as processes of their own, as on a cluster."""

    def __init__(self, folder: Path, workers: int = 2, *more: str):
        self.file = folder / "scheduler.json"
        self.file.unlink(missing_ok=True)
        flags = ["--scheduler-file", str(self.file), "--no-dashboard", *more]
        python = [sys.executable, "-m"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, "start_new_session": True}
        self.scheduler = subprocess.Popen([*python, "distributed.cli.dask_scheduler", *flags, "--port", "0"], **quiet)
        self.workers = [
            subprocess.Popen([*python, "distributed.cli.dask_worker", *flags, "--nthreads", "1"], **quiet)
            for _ in range(workers)
        ]

    def __enter__(self):
        wait_for(self.file.exists, self.scheduler)
        return self

    def __exit__(self, *_):
        for process in (*self.workers, self.scheduler):
            kill(worker_processes(process.pid))
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            finally:
                process.wait()
