"""SIGTERM and Ctrl-C, once and twice, in every stage: a clean stop, the right words, and the same command goes on."""

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from faulty import Started, chances, finish, records, run_command, stores, wait_for, worker_processes

STAGES = {
    "importing": lambda out: True,
    "starting": lambda out: out.exists(),
    "registering": lambda out: len(records(out)) >= 3,
    "aligning": lambda out: any(path.parent.name == "align" for path in records(out)),
    "finishing": lambda out: len(records(out)) == 12,
}


def send(process, number):
    """As from a terminal, Ctrl-C reaches the whole process group; a batch system's SIGTERM the driver."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)


def hears(pid):
    """Whether a process has its own say about SIGTERM, which Python by itself has not before our first line."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:  # it ended
        return True
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES)
def test_signals(stage, number, twice, stored, undisturbed, tmp_path, many, tried):
    chance = chances(f"{stage}{number}{twice}")
    for repeat in range(many(1, 8)):
        out = tmp_path / str(repeat)
        if stage == "aligning":
            shutil.copytree(undisturbed, out)
            shutil.rmtree(out / "units" / "align")
        process = Started(run_command(stored, out, "--workers", 2))
        wait_for(lambda out=out: STAGES[stage](out), process)
        wait_for(lambda process=process: hears(process.pid), process)
        time.sleep((1.0 if stage == "importing" else 0.3) * chance.random())
        workers = worker_processes(process.pid)
        working = process.poll() is None
        send(process, number)
        if twice and process.poll() is None:
            time.sleep(0.1 * chance.random())
            send(process, number)
        status, words = process.end(60)
        assert status == (130 if working else 0) or (stage == "finishing" and status in (0, 130)), (status, words)
        assert "Traceback" not in words, words
        if status == 130:
            assert "Stopped. What is finished is kept: give the same command again to go on." in words
        if not twice:
            assert not (out / "lease.json").exists()
        wait_for(lambda workers=workers: not any(worker.is_running() for worker in workers), patience=20)
        finish(stored, out)
        assert stores(out) == stores(undisturbed)
        tried(f"{signal.Signals(number).name} {'twice' if twice else 'once'} while {stage}")
