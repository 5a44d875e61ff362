"""What other processes do in tests; they import it by name."""

import multiprocessing
import socket
import time

import stillframe.leases
from stillframe.errors import LeaseError
from stillframe.leases import lease


def race(folder, start, answers):
    """Try to get the lease, tell whether it worked, and hold it for a while."""
    start.wait()
    try:
        with lease(folder):
            answers.put(True)
            time.sleep(2)
    except LeaseError:
        answers.put(False)


def drive(start, settings, answers):
    """Run as a driver among several; tell how it ended."""
    from stillframe.batch import run

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
    stillframe.leases.STALE, stillframe.leases.HEARTBEAT = 2.0, 0.2
    from stillframe.cli import main

    main()
