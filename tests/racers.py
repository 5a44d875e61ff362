"""What other processes do in tests; they import it by name."""

import multiprocessing
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import stillframe.workflow.lease
from stillframe.errors import LeaseError
from stillframe.workflow.lease import lease
from stillframe.workflow.run_folder import RunFolder


def race(folder, start, answers):
    """Try to get the lease, tell whether it worked, and hold it for a while."""
    start.wait()
    try:
        with lease(RunFolder(folder)):
            answers.put(True)
            time.sleep(2)
    except LeaseError:
        answers.put(False)


def drive(start, settings, answers):
    """Run as a driver among several; tell how it ended."""
    from stillframe.workflow.driver import run

    start.wait()
    try:
        answers.put(run(settings).problems)
    except LeaseError as error:
        answers.put(str(error))


def spawn(count, target, *arguments):
    """Start processes that wait for a common start, and gather what they answer."""
    context = multiprocessing.get_context("spawn")
    start, answers = context.Event(), context.Queue()
    racers = [context.Process(target=target, args=(start, *arguments, answers)) for _ in range(count)]
    for racer in racers:
        racer.start()
    time.sleep(0.1)
    start.set()
    got = [answers.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    return got


def elsewhere():
    """Be the command line on another machine, whose lease is void after two seconds of silence."""
    socket.gethostname = lambda: "elsewhere"
    stillframe.workflow.lease.STALE, stillframe.workflow.lease.HEARTBEAT = 2.0, 0.2
    from stillframe.cli import main

    main()


@dataclass(frozen=True)
class Flaky:
    """Work that fails some times on the first item; it keeps where it was tried."""

    folder: Path
    failures: int
    error: Exception | None = None

    def __call__(self, item):
        file = self.folder / str(item)
        with file.open("a") as stream:
            stream.write(f"{_on_worker() or 'here'} ")
        if item == 0 and len(file.read_text().split()) <= self.failures:
            raise self.error or ValueError("not now")
        return "done"


def _on_worker():
    from distributed import get_worker

    try:
        return get_worker().address
    except ValueError:
        return ""


@dataclass(frozen=True)
class Broken:
    """Work that fails on every item; it keeps which it saw."""

    folder: Path

    def __call__(self, item):
        (self.folder / str(item)).touch()
        raise ValueError("never")


@dataclass(frozen=True)
class Unfetchable:
    """Work whose result can be sent, but not be received."""

    folder: Path

    def __call__(self, item):
        with (self.folder / str(item)).open("a") as stream:
            stream.write(".")
        return _Bomb()


class _Bomb:
    def __reduce__(self):
        return _explode, ()


def _explode():
    raise ImportError("not installed here")


class AllAtOnce:
    """Waits until so many of these are under way; gives how many were."""

    def __init__(self, folder, wanted):
        self.folder, self.wanted = folder, wanted

    def __call__(self, item):
        (self.folder / str(item)).touch()
        until = time.monotonic() + 20
        while len(list(self.folder.iterdir())) < self.wanted and time.monotonic() < until:
            time.sleep(0.05)
        return len(list(self.folder.iterdir()))
