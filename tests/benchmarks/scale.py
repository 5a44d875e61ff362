"""What hundreds of gigabytes take: 36,000 frames of 2048², whose files are hard links to some dozens of different ones.

    python tests/benchmarks/scale.py [--folder DIR] [--frames 36000] [--out scale.json] [--parts ...]

Reading, decoding and scheduling are real; what the disk can do is not measured, since so few different files stay in
memory. Parts: register (the whole stack in one command, with memory on the way), resume (the same, killed at a random
third), schedule (tasks that do nothing; the lazy graph), workers (two against one), project (what follows for
clusters). Needs the extra ``benchmark``.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from speed import MAX_SHIFT, Nothing, Stages, best_in_turn, clock, context, linked, scene

import stillframe as sf
from stillframe import Reference, Settings
from stillframe.cluster.connect import executor
from stillframe.cluster.executors import results
from stillframe.partition import Plan
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate
from stillframe.storage.frames import open_source
from stillframe.workflow.staleness import Dependencies

DIFFERENT = 384
"""Frames that are really different."""
MARKS = (0.01, 0.1, 1.0)
"""Parts of the stack at which memory is told."""
PARTS = ("register", "resume", "schedule", "workers", "project")
EMPTY_UNITS, LAZY_FRAMES, SHORT, PROJECTED = 20_000, 40_000, 2_560, 1_280


class Watched:
    """A run as a command, its memory looked at now and then."""

    def __init__(self, store, mask, out, workers, *more):
        self.out = out
        command = ["run", store, "--mask", mask, "--out", out, "--workers", workers, "--no-align", *more]
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stillframe", *map(str, command)], start_new_session=True, stdout=subprocess.DEVNULL
        )
        self.peaks, self.marks, self.times = {"driver": 0, "worker": 0}, {}, {}
        self.before = self.peaks

    def done(self):
        return len(list((self.out / "units" / "register").glob("[0-9]*.json")))

    def look(self, units):
        """Take note of the largest resident size of the driver and of any worker, and of what is done."""
        driver, part, now = psutil.Process(self.process.pid), self.done() / units, time.perf_counter() - self.began
        if part and "first unit" not in self.times:  # what making the reference took would hide what comes
            self.before, self.peaks = self.peaks, dict.fromkeys(self.peaks, 0)
        sizes = {"driver": [driver], "worker": driver.children(recursive=True)}
        for name, processes in sizes.items():
            self.peaks[name] = max(self.peaks[name], *(size(process) for process in processes), 0)
        for mark in MARKS:
            if part >= mark and mark not in self.marks:
                self.marks[mark] = dict(self.peaks)
        if part:
            self.times.setdefault("first unit", now)
        if part == 1:
            self.times.setdefault("last unit", now)
        return part

    def until(self, units, part, pause=1.0):
        """Watch until so much is done, or all is over; return how long that took."""
        while self.process.poll() is None:
            try:
                if self.look(units) >= part and part < 1:
                    break
            except psutil.Error:
                continue
            time.sleep(pause)
        return time.perf_counter() - self.began

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def size(process):
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def register(store, mask, folder, options):
    """Seconds, and memory at 1 %, 10 % and 100 %, of registering the whole stack in one command."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    units = len(units_of(store))
    run = Watched(store, mask, out, options.workers)
    seconds = run.until(units, 1.0)
    if run.process.returncode:
        raise RuntimeError(f"the run ended with {run.process.returncode}; {out / 'run.log'} tells more")
    run.marks.setdefault(1.0, run.peaks)
    return {
        "frames": open_source(store).shape[0],
        "units": units,
        "seconds": seconds,
        "until": run.times,
        "memory_before_the_first_unit": run.before,
        "memory_since": {str(mark): found for mark, found in run.marks.items()},
    }


def units_of(store):
    return Plan(open_source(store).shape[0], 16).units


def resume(store, mask, folder, options):
    """Seconds that a kill at a random third costs, and whether the shifts are the bytes of ``register``."""
    out, units = folder / "killed", len(units_of(store))
    shutil.rmtree(out, ignore_errors=True)
    part = random.uniform(1 / 4, 5 / 12)
    first = Watched(store, mask, out, options.workers)
    before = first.until(units, part, pause=0.2)
    first.kill()
    done = first.done()
    second = Watched(store, mask, out, options.workers)
    while second.process.poll() is None and second.done() <= done:
        time.sleep(0.05)
    idle = time.perf_counter() - second.began
    after = second.until(units, 1.0)
    return {
        "killed_at": done / units,
        "seconds": [before, after],
        "until_the_next_unit": idle,
        "same_shifts": same(folder / "run" / "shifts.zarr", out / "shifts.zarr"),
    }


def same(one, other):
    """Tell whether two stores are the same, file by file."""
    names = [
        sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()) for store in (one, other)
    ]
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


def schedule(store, folder, options):
    """Milliseconds of a task that does nothing, and seconds in which the lazy form of many frames is built."""
    settings = Settings(frames=store, out=folder / "nothing", workers=options.workers)
    items = [(unit, Dependencies({"files": "0" * 64})) for unit in Plan(EMPTY_UNITS, 1).units]
    with executor(settings, None, threading.Event()) as cluster:
        list(results(cluster, Nothing(), items[:200]))
        seconds = clock(lambda: list(results(cluster, Nothing(), items)))
    long = linked(store, LAZY_FRAMES / open_source(store).shape[0], folder / "lazy")
    reference = Reference(long[0, :, :], max_shift=MAX_SHIFT)
    began = time.perf_counter()
    frames = sf.open_frames(long.path)
    shifts = sf.register(frames, reference)
    aligned = sf.align(frames, shifts)
    built = time.perf_counter() - began
    tasks = len(dict(aligned.__dask_graph__()))
    return {
        "units": EMPTY_UNITS,
        "milliseconds": 1e3 * seconds / EMPTY_UNITS,
        "lazy_frames": frames.shape[0],
        "lazy_tasks": tasks,
        "lazy_seconds": built,
        "lazy_with_all_tasks": time.perf_counter() - began,
    }


def keep_to(cores):
    """Keep the process that runs this, with all its threads, to these cores, as a batch system does with a job."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def bind(cluster, *, bound):
    """Keep each worker to a core of its own, or let all go where they like."""
    every = sorted(os.sched_getaffinity(0))
    for number, address in enumerate(sorted(cluster.client.nthreads())):
        cluster.client.run(keep_to, every[number % len(every) :][:1] if bound else every, workers=[address])


def workers(store, mask, folder, options):
    """Seconds of registering a stack with one worker and with two, in turn, each at its best.

    On cores of their own, as in jobs of a batch system, and free: a lone worker then decodes on the other core.
    """
    source = linked(store, SHORT / open_source(store).shape[0], folder / "short")
    reference = Reference(source[0, :, :], np.load(mask), max_shift=MAX_SHIFT)
    for number in (1, 2):
        where = folder / f"workers-{number}"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
    with (
        executor(Settings(frames=source.path, out=folder / "1", workers=1), None, threading.Event()) as one,
        executor(Settings(frames=source.path, out=folder / "2", workers=2), None, threading.Event()) as two,
    ):
        stages = {"one": Stages(one, source, reference, folder / "workers-1")}
        stages["two"] = Stages(two, source, reference, folder / "workers-2")
        for some in stages.values():
            some.register()

        def on(name, bound):
            bind(stages[name].workers, bound=bound)
            stages[name].register()

        works = {(name, bound): partial(on, name, bound) for bound in (True, False) for name in stages}
        found = best_in_turn(works, options.repeats)
    seconds = {
        where: {name: found[name, bound] for name in stages} for where, bound in (("bound", True), ("free", False))
    }
    ratios = {where: some["one"] / some["two"] for where, some in seconds.items()}
    return {"frames": source.shape[0], "seconds": seconds, "ratio": ratios}


@dataclass(frozen=True)
class Costs:
    """What the projection is made from, for frames of 2048² uint16."""

    register: float
    """Seconds a frame on one core: read, decode, register."""
    both: float
    """Seconds a frame on one core: the same, and align and write whole pixels."""
    read: float
    """Bytes a frame, compressed."""
    written: float
    """Bytes a frame, compressed."""
    unit: float
    """Seconds that the driver and its scheduler spend on a unit."""
    records: float
    """Seconds in which the driver alone looks through the records of a unit, before and after all work."""
    start: float = 94.0
    """Seconds until the first unit, beyond waiting in the queue: as ``register`` found it, mostly for the reference."""


@dataclass(frozen=True)
class Site:
    """A stated, not a measured, computing centre."""

    cores: int = 32
    """Workers on a node."""
    node: float = 2e9
    """Bytes a second between a node and the file system."""
    storage: float = 20e9
    """Bytes a second that the file system gives to all."""


def project(costs, site, frames, nodes, *, align, unit_frames=16):
    """Seconds, node hours and what limits, for a stack on a cluster."""
    moved = frames * (costs.read + (costs.written if align else 0))
    times = {
        "processors": frames * (costs.both if align else costs.register) / (nodes * site.cores),
        "scheduler": frames / unit_frames * costs.unit,
        "network of nodes": moved / (nodes * site.node),
        "file system": moved / site.storage,
    }
    limit = max(times, key=times.get)
    seconds = costs.start + frames / unit_frames * costs.records + times[limit]
    return {"seconds": seconds, "node_hours": seconds * nodes / 3600, "limit": limit, "times": times}


FRAMES_OF = {"300 GB": 36_000, "30 TB": 3_600_000}


def projections(costs, site):
    return [
        {"input": name, "nodes": nodes, "align": align, **project(costs, site, frames, nodes, align=align)}
        for name, frames in FRAMES_OF.items()
        for nodes in (8, 64)
        for align in (False, True)
    ]


def measured(source, reference, folder, units):
    """Costs of a frame, measured through one worker over a short stack."""
    with executor(Settings(frames=source.path, out=folder / "c", workers=1), None, threading.Event()) as cluster:
        shutil.rmtree(folder / "costs", ignore_errors=True)
        (folder / "costs").mkdir()
        one = Stages(cluster, source, reference, folder / "costs")
        one.register()
        times = best_in_turn({"register": one.register, "both": lambda: one.both("nearest", "uint16")}, 3)
    shards = list((folder / "costs" / "run" / "aligned.zarr" / "frames" / "c").rglob("0"))
    written = sum(path.stat().st_size for path in shards if path.is_file())
    read = sum(path.stat().st_size for path in (source.path / "c").rglob("*") if path.is_file())
    frames = source.shape[0]
    core = {name: seconds / frames for name, seconds in times.items()}
    return Costs(core["register"], core["both"], read / frames, written / frames, units, records(folder / "records"))


def records(folder, few=100, many=1100):
    """Seconds a unit in which a run finds that all is done already, which looks through the records as any other."""
    seconds = []
    for frames in (few, many):
        store, mask = simulate(Experiment(frames=frames, shape=(64, 64)), folder / str(frames))
        out = folder / f"run-{frames}"
        shutil.rmtree(out, ignore_errors=True)
        settings = Settings(frames=store, mask=mask, out=out, reference="0", max_shift=8, unit_frames=1, workers=0)
        sf.run(settings)
        seconds.append(clock(partial(sf.run, settings)))
    return (seconds[1] - seconds[0]) / (many - few)


def table(rows):
    shown = Table("input", "nodes", "", "time", "node hours", "limit")
    for row in rows:
        what = "register and align" if row["align"] else "register"
        hours = f"{row['node_hours']:.1f}"
        shown.add_row(row["input"], str(row["nodes"]), what, f"{row['seconds'] / 60:.1f} min", hours, row["limit"])
    return shown


def measure(options, folder):
    store, mask = folder / "different" / "frames.zarr", folder / "different" / "mask.npy"
    if not store.exists():
        simulate(scene(2048, DIFFERENT), folder / "different")
    found = {"context": context(options)}
    if {"register", "resume"} & set(options.parts):
        long = linked(store, options.frames / DIFFERENT, folder / "all").path
    if "register" in options.parts:
        found["register"] = register(long, mask, folder, options)
        Console().print(found["register"])
    if "resume" in options.parts:
        found["resume"] = resume(long, mask, folder, options)
        Console().print(found["resume"])
    if "schedule" in options.parts:
        found["schedule"] = schedule(store, folder, options)
        Console().print(found["schedule"])
    if "workers" in options.parts:
        found["workers"] = workers(store, mask, folder, options)
        Console().print(found["workers"])
    if "project" in options.parts:
        source = linked(store, PROJECTED / DIFFERENT, folder / "short")
        reference = Reference(source[0, :, :], np.load(mask), max_shift=MAX_SHIFT)
        unit = found.get("schedule", {"milliseconds": 3.0})["milliseconds"] / 1e3
        costs, site = measured(source, reference, folder, unit), Site()
        rows = projections(costs, site)
        found["project"] = {"costs": asdict(costs), "site": asdict(site), "rows": rows}
        Console().print(found["project"]["costs"], found["project"]["site"], table(rows))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where some 3 GB go, and are kept; a temporary one by default")
    parser.add_argument("--frames", type=int, default=36_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path("scale.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options, (options.folder or Path(temporary)).absolute())
    options.out.write_text(json.dumps(found, indent=2, default=str))


if __name__ == "__main__":
    main()
