"""How fast the kernel and a whole run are, beside what they cannot beat and what they replace, in one run.

    python tests/benchmarks/speed.py [--sizes 512 1024 2048 4096] [--frames 128] [--folder DIR] [--out speed.json]

Everything that is compared is timed in turn and each at its best, so that ratios hold on a noisy machine. Needs the
extra ``benchmark``. ``--parts`` chooses some of: kernel, bins, profile, codecs, run, today, growth, start.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
    os.environ[f"{library}_NUM_THREADS"] = "1"
os.environ.setdefault("DASK_DISTRIBUTED__LOGGING__DISTRIBUTED", "error")

import dask.array as da
import numcodecs
import numpy as np
import scipy.fft
import scipy.ndimage
import zarr
from ecc import Ecc, available
from numcodecs import blosc
from rich.console import Console
from rich.table import Table
from skimage.registration import phase_cross_correlation

from stillframe import Reference, Settings, match_frames
from stillframe.cluster.connect import executor
from stillframe.cluster.executors import results, unit_budget
from stillframe.images.binning import bin_sums, moved_bins
from stillframe.images.resample import resample_frames
from stillframe.partition import Plan, make_plan, unit_memory
from stillframe.registration.prepared_reference import prepare
from stillframe.registration.refine import refine
from stillframe.simulation.experiment import Experiment
from stillframe.simulation.write import simulate
from stillframe.storage.aligned_store import AlignedLayout, draft_unit
from stillframe.storage.checksums import fingerprint
from stillframe.storage.durable import write_durably
from stillframe.storage.frames import FrameSource, open_source
from stillframe.storage.reference_store import save_reference
from stillframe.workflow.lease import lease
from stillframe.workflow.ledger import Ledger, UnitRecord, fields_of
from stillframe.workflow.run_folder import RunFolder
from stillframe.workflow.staleness import INPUT_FILES, Alignment, Dependencies
from stillframe.workflow.unit_tasks import AlignUnit, BothStages, Job, RegisterUnit

SIZE, MAX_SHIFT = 2048, 32
GROWN = 6400
"""Frames of the long stack."""
PARTS = ("kernel", "bins", "profile", "codecs", "run", "today", "growth", "start")
PACKAGES = ("stillframe", "numpy", "scipy", "numba", "zarr", "dask", "scikit-image", "itk-filtering")


def scene(size, frames=40):
    return Experiment(frames=frames, shape=(size, size), dead_pixels=1000 / size**2, seed=11)


def clock(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def best_in_turn(works, repeats, pick=min):
    """Shortest time of each (or another pick), seconds, all of them gone through again and again."""
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work))
    return {name: float(pick(some)) for name, some in times.items()}


def itk_registration(fixed, frame, mask):
    """Return what lets ITK compute its masked NCC of a pair, one thread."""
    import itk

    itk.MultiThreaderBase.SetGlobalMaximumNumberOfThreads(1)
    kept = np.ascontiguousarray(mask, np.float32)
    fixed, moving, valid = (itk.image_from_array(image.astype(np.float32)) for image in (fixed, frame, kept))
    work = itk.MaskedFFTNormalizedCorrelationImageFilter.New(
        FixedImage=fixed, MovingImage=moving, FixedImageMask=valid, MovingImageMask=valid
    )
    work.SetRequiredFractionOfOverlappingPixels(0.3)
    return work.Update


def opencv(fixed, frame, mask, reference):
    """Return the time of OpenCV's masked ECC from the whole-pixel shift, seconds; empty without OpenCV 5."""
    if not available():
        return {}
    ecc, match = Ecc(fixed, mask, size=11), match_frames(frame[None], reference)[0]
    start = round(float(match["dy"])), round(float(match["dx"]))
    ecc.shift(frame, start)
    return best_in_turn({"opencv_ecc": lambda: ecc.shift(frame, start)}, 3)


def kernel(size, peers):
    """Times of one match of one frame, seconds."""
    experiment = scene(size)
    mask, fixed, frame = experiment.detector.mask, experiment.render(0), experiment.render(30)
    reference = Reference(fixed, mask, max_shift=MAX_SHIFT)
    prepared = prepare(reference)
    surveyed = prepared.survey(frame)
    works = {
        "rfft2": lambda: scipy.fft.rfft2(frame.astype(np.float32)),
        "match": lambda: match_frames(frame[None], reference),
        "whole_pixels": lambda: prepared.exact_search.surface(frame, surveyed.statistics),
    }
    first = clock(lambda: match_frames(frame[None], reference.replace(history="again")))
    works["whole_pixels"]()
    times = best_in_turn(works, 15) | {"first_match": first}
    if peers:
        times["scikit_image"] = clock(
            lambda: phase_cross_correlation(fixed, frame, reference_mask=mask, moving_mask=mask, overlap_ratio=0.3)
        )
        times["itk"] = clock(itk_registration(fixed, frame, mask))
        times |= opencv(fixed, frame, mask, reference)
    found, truth = match_frames(frame[None], reference)[0], experiment.shifts[30] - experiment.shifts[0]
    shifts = {"found": [float(found["dy"]), float(found["dx"])], "true": truth.tolist(), "flag": int(found["flag"])}
    return {"size": size, "seconds": times, **shifts}


def bins(frames=20):
    """In which bins the whole-pixel peak of frames was beyond doubt, by pattern and dose; 1 is the exact search."""
    counts = []
    for pattern, dose in product(("rings", "spots"), (200, 20, 2)):
        experiment = Experiment(frames=frames + 1, shape=(SIZE, SIZE), pattern=pattern, dose=dose, seed=12)
        mask = experiment.detector.mask
        prepared = prepare(Reference(experiment.render(0), mask, max_shift=MAX_SHIFT))
        sides = Counter()
        for index in range(1, frames + 1):
            surveyed = prepared.survey(experiment.render(index))
            sides[next((search.side for search in prepared.coarse_searches if search.find(surveyed)), 1)] += 1
        counts.append({"pattern": pattern, "dose": dose, **{str(side): sides[side] for side in (8, 4, 1)}})
    return counts


def codecs(frame):
    """Milliseconds to encode and to decode one frame, one thread, and by how much it shrinks."""
    found = []
    for name, level, shuffle in product(("lz4", "zstd"), (1, 5), (blosc.SHUFFLE, blosc.BITSHUFFLE)):
        packed = blosc.compress(frame, name.encode(), level, shuffle)
        times = best_in_turn(
            {
                "encode": lambda name=name, level=level, shuffle=shuffle: blosc.compress(
                    frame, name.encode(), level, shuffle
                ),
                "decode": lambda packed=packed: blosc.decompress(packed),
            },
            7,
        )
        called = f"Blosc {name}-{level}, {'bit' if shuffle == blosc.BITSHUFFLE else ''}shuffle"
        found.append({"codec": called, "ratio": frame.nbytes / len(packed), **times})
    zstd = numcodecs.Zstd(level=0)
    packed = zstd.encode(frame)
    times = best_in_turn({"encode": lambda: zstd.encode(frame), "decode": lambda: zstd.decode(packed)}, 5)
    return [*found, {"codec": "Zstd (zarr's default)", "ratio": frame.nbytes / len(packed), **times}]


def each(work, *lists):
    return lambda: [work(*items) for items in zip(*lists, strict=True)]


def matching(frames, reference):
    """Steps of a match, and passes over the pixels that they cannot do without."""
    prepared = prepare(reference)
    template, fixed, valid = prepared.template, prepared.score_image, prepared.frame_pixels
    rows, bins = np.arange(-(-len(fixed) // template.side)), prepared.coarse_searches[0]
    surveyed = [prepared.survey(frame) for frame in frames]
    peaks = each(prepared.find_peak, frames, surveyed)()

    def refined(one, peak):
        hidden = prepared.hidden_bins
        return refine(one.single, one.valid, peak.shift, template, fixed, slack=peak.slack, hidden=hidden)

    def pass_over(one, estimate):
        moved_bins(one.single.values, one.valid, one.single.base, fixed, estimate.start, template.side, rows)

    def score(one, estimate):
        return prepared.score(estimate.start, one.single, one.statistics, valid, estimate.product)

    estimates = each(refined, surveyed, peaks)()
    return {
        "survey": each(prepared.survey, frames),
        "pass over frames": each(lambda one: bin_sums(one.single.values, one.valid, one.single.base, 8), surveyed),
        "whole-pixel peak": each(prepared.find_peak, frames, surveyed),
        "two transforms of bins": each(lambda one: scipy.fft.irfft2(scipy.fft.rfft2(bins.sums(one))), surveyed),
        "refine": each(refined, surveyed, peaks),
        "pass over frames and reference": each(pass_over, surveyed, estimates),
        "score": each(score, surveyed, estimates),
        "match": lambda: match_frames(frames, reference),
    }


def moving(frames, reference):
    """Steps of an alignment, and the copies below them."""
    mask, copy, single_precision = reference.frame_mask, np.empty_like(frames), np.empty(frames.shape, np.float32)
    matches = match_frames(frames, reference)
    moves = np.stack([matches["dy"], matches["dx"]], axis=1)
    return {
        "lay, whole pixels": lambda: resample_frames(frames, moves, mask, interpolation="nearest"),
        "copy": lambda: np.copyto(copy, frames),
        "lay, cubic": lambda: resample_frames(frames, moves, mask, interpolation="cubic"),
        "copy to float32": lambda: np.copyto(single_precision, frames),
    }


def storing(frames, matches, folder):
    """Steps of reading and writing, and the codec below them."""
    packed = [blosc.compress(frame, b"lz4", 5, blosc.BITSHUFFLE) for frame in frames]
    path = create_store(folder, frames.shape, len(frames), frames.dtype)
    unit, ledger = Plan(len(frames), len(frames)).units[0], Ledger(RunFolder(folder))
    drafts = folder / "drafts"
    drafts.mkdir()
    content, found = draft_unit(path, unit, frames, drafts).file.read_bytes(), fields_of(matches)
    record = UnitRecord(stage="register", unit=0, start=0, stop=len(frames), fingerprint="", matches=found)
    ledger.prepare()
    return {
        "decode": each(blosc.decompress, packed),
        "write": lambda: draft_unit(path, unit, frames, drafts).put_in_place(),
        "encode": each(lambda frame: blosc.compress(frame, b"lz4", 5, blosc.BITSHUFFLE), frames),
        "checksum": lambda: hashlib.sha256(content).digest(),
        "record": lambda: ledger.publish(record),
        "write a letter durably": lambda: write_durably(folder / "letter", b"a"),
    }


def profile(source, reference, folder):
    """Where a unit's time goes: seconds a frame of each step on one thread, and of a floor below it."""
    first = Plan(source.shape[0], 16).units[0]
    frames = source.read(first).frames
    steps = {"read": lambda: source.read(first)} | matching(frames, reference) | moving(frames, reference)
    steps |= storing(frames, match_frames(frames, reference), folder / "profile")
    with zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1}):
        times = best_in_turn(steps, 7)
    return {name: seconds / len(frames) for name, seconds in times.items()}


FLOORS = {
    "read": "decode",
    "survey": "pass over frames",
    "whole-pixel peak": "two transforms of bins",
    "refine": "pass over frames and reference",
    "score": None,
    "match": None,
    "lay, whole pixels": "copy",
    "lay, cubic": "copy to float32",
    "write": "encode",
    "checksum": None,
    "record": "write a letter durably",
}
"""What each step of the profile cannot beat."""


def create_store(folder, shape, unit_frames, dtype):
    """Create a store of aligned frames and return its path."""
    path = folder / "aligned.zarr"
    shutil.rmtree(path, ignore_errors=True)
    AlignedLayout(shape, np.dtype(dtype), unit_frames, "nearest", 0.0).create(path, [])
    return path


@dataclass(frozen=True)
class Read:
    """Read and decode a unit."""

    source: FrameSource

    def __call__(self, work):
        return float(self.source.read(work[0]).frames[0, 0, 0])


@dataclass(frozen=True)
class Nothing:
    """A task that does nothing."""

    def __call__(self, work):
        return None


@dataclass(frozen=True)
class Copy:
    """Copy a unit as the run writes it."""

    source: FrameSource
    folder: Path
    dtype: str

    def __call__(self, work):
        frames = self.source.read(work[0]).frames.astype(self.dtype, copy=False)
        draft_unit(self.folder / "aligned.zarr", work[0], frames, self.folder / "drafts").put_in_place()


def peak_memory():
    """Largest resident size of this process so far, bytes; that of ``getrusage`` may be its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


class Stages:
    """The stages of a run and the copies they are compared with, on one cluster."""

    def __init__(self, workers, source, reference, folder):
        self.workers, self.source, self.folder = workers, source, folder
        self.stored = save_reference(reference, folder / "reference.zarr")
        self.layout = source.layout
        budget = unit_budget(workers)
        self.plan = make_plan(self.layout, budget=budget, output_itemsize=2, max_shift=MAX_SHIFT)
        self.items = [(unit, self.mark(unit)) for unit in self.plan.units]

    def mark(self, unit):
        """What a unit is known by; different each time, so that nothing counts as finished."""
        files = self.source.identity(unit.start, unit.stop)
        return Dependencies({INPUT_FILES: fingerprint({"files": files}), "time": repr(time.perf_counter())})

    def all(self, work, items=None):
        for _, outcome in results(self.workers, work, items or self.items):
            if isinstance(outcome, BaseException):
                raise outcome

    def make(self, name, dtype):
        create_store(self.folder / name, self.source.shape, self.plan.unit_frames, np.dtype(dtype))
        (self.folder / name / "drafts").mkdir(exist_ok=True)
        Ledger(RunFolder(self.folder / name)).prepare()
        return self.folder / name

    def read(self):
        self.all(Read(self.source))

    def copy(self, dtype):
        self.all(Copy(self.source, self.make("copy", dtype), dtype))

    def register(self):
        with self.driven(self.make("run", "uint16")) as job:
            self.all(RegisterUnit(job), [(unit, self.mark(unit)) for unit in self.plan.units])

    def both(self, interpolation, dtype):
        with self.driven(self.make("run", dtype)) as job:
            work = BothStages(RegisterUnit(job), AlignUnit(job, Alignment(interpolation, 0.0, self.plan.unit_frames)))
            self.all(work, [(unit, self.mark(unit)) for unit in self.plan.units])

    @contextlib.contextmanager
    def driven(self, folder):
        with lease(RunFolder(folder)) as held:
            held.drafts.mkdir(parents=True)
            yield Job(self.source, self.stored, held.claim())
            shutil.rmtree(held.drafts.parent)


def stages(source, reference, folder, workers, repeats, names=None, pick=min):
    """Times of the stages over all units, seconds, and the workers' memory, bytes."""
    settings = Settings(frames=source.path, out=folder / "run", workers=workers)
    with executor(settings, None, threading.Event()) as cluster:
        one = Stages(cluster, source, reference, folder)
        works = {
            "nothing": lambda: one.all(Nothing()),
            "read": one.read,
            "register": one.register,
            "copy": lambda: one.copy("uint16"),
            "whole_pixels": lambda: one.both("nearest", "uint16"),
            "copy_float": lambda: one.copy("float32"),
            "cubic": lambda: one.both("cubic", "float32"),
        }
        one.register()
        times = best_in_turn({name: works[name] for name in names or works}, repeats, pick)
        peaks = cluster.client.run(peak_memory)
        per_frame = {name: seconds / one.plan.frames for name, seconds in times.items()}
        predicted = unit_memory(one.layout, one.plan.unit_frames, 4, MAX_SHIFT) + 350 * 2**20
    return {
        "frames": one.plan.frames,
        "unit_frames": one.plan.unit_frames,
        "workers": workers,
        "seconds_per_frame": per_frame,
        "peak_bytes": max(peaks.values()),
        "predicted_bytes": predicted,
    }


def register_block(block, fixed, mask):
    """What a user would write today: whole frames through scikit-image and SciPy."""
    out = np.empty(block.shape, np.float32)
    for frame, target in zip(block, out, strict=True):
        shift = phase_cross_correlation(fixed, frame, reference_mask=mask, moving_mask=mask, overlap_ratio=0.3)[0]
        target[:] = scipy.ndimage.shift(frame.astype(np.float32), shift)
    return out


def today(source, fixed, mask, folder, workers, frames=4):
    """Seconds per frame of ``map_blocks`` over scikit-image's registration with zarr's defaults."""
    settings = Settings(frames=source.path, out=folder / "run", workers=workers)
    with executor(settings, None, threading.Event()):
        stack = da.from_zarr(str(source.path))[:frames].rechunk((1, -1, -1))
        laid = stack.map_blocks(register_block, fixed, mask, dtype=np.float32)
        seconds = clock(lambda: da.to_zarr(laid, str(folder / "today.zarr"), overwrite=True))
    return {"frames": frames, "workers": workers, "seconds_per_frame": seconds / frames}


def linked(store, times, folder):
    """A store so many times as long, its shards hard links."""
    source = open_source(store)
    array, shard = source.array, source.array.shards[0]
    whole, wanted = source.shape[0] // shard, round(times * source.shape[0] / shard)
    path = folder / "long.zarr" / "frames"
    long = zarr.create_array(
        path,
        shape=(wanted * shard, *source.shape[1:]),
        dtype=source.dtype,
        chunks=array.chunks,
        shards=array.shards,
        compressors=array.compressors,
        dimension_names=("frame", "y", "x"),
        overwrite=True,
    )
    for number in range(wanted):
        old, new = (
            where / one.metadata.encode_chunk_key((place, 0, 0))
            for where, one, place in ((source.path, array, number % whole), (path, long, number))
        )
        new.parent.mkdir(parents=True, exist_ok=True)
        os.link(old, new)
    return open_source(path)


def growth(store, reference, folder, options):
    """Times and memory of a short stack and of one so many times as long, whose shards are hard links.

    The short one is gone through before and after, since machines change their pace within minutes. All times are
    means: the best of many would be compared with one.
    """
    few = -(-GROWN // options.growth // 16) * 16
    cut = linked(store, few / open_source(store).shape[0], folder / "few")
    many = linked(store, options.growth * few / open_source(store).shape[0], folder / "many")
    names = ("read", "register", "whole_pixels")
    before, grown, after = (
        stages(stack, reference, folder, options.workers, repeats, names, np.mean)
        for stack, repeats in ((cut, 15), (many, 1), (cut, 15))
    )
    usual = {name: (before["seconds_per_frame"][name] + after["seconds_per_frame"][name]) / 2 for name in names}
    return [before | {"seconds_per_frame": usual}, grown]


def first_result(store, mask, folder, cache):
    """Seconds from the command to the first unit's record."""
    shutil.rmtree(folder / "first", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "stillframe",
        "run",
        store,
        "--mask",
        mask,
        "--out",
        folder / "first",
        "--reference",
        "0",
    ]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], env=environment, stderr=subprocess.DEVNULL)
    while not list((folder / "first").glob("units/register/*")) and process.poll() is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    if process.poll() is not None:
        raise RuntimeError(f"the run ended with {process.returncode} before its first unit: {command}")
    process.terminate()
    process.wait()
    return seconds


def measure(options, folder):
    results = {"context": context(options)}
    alone = {"kernel": lambda: [kernel(size, size <= options.peers) for size in options.sizes], "bins": bins}
    results |= {name: work() for name, work in alone.items() if name in options.parts}
    if set(options.parts) <= set(alone):
        return results
    store, mask = simulate(scene(SIZE, options.frames), folder)
    source, valid = open_source(store), np.load(mask)
    reference = Reference(source[0, :, :], valid, max_shift=MAX_SHIFT)
    stored = {
        "codecs": lambda: codecs(np.asarray(source[0, :, :])),
        "profile": lambda: profile(source, reference, folder),
        "run": lambda: stages(source, reference, folder, options.workers, options.repeats),
        "today": lambda: today(source, reference.image, valid, folder, options.workers),
        "growth": lambda: growth(store, reference, folder, options),
        "start": lambda: {name: first_result(store, mask, folder, folder / "numba") for name in ("cold", "warm")},
    }
    return results | {name: work() for name, work in stored.items() if name in options.parts}


def context(options):
    versions = {name: version(name) for name in PACKAGES if name != "itk-filtering" or "kernel" in options.parts}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "frame": f"{SIZE}² uint16, max_shift {MAX_SHIFT}",
        **versions,
    }


def show(results):
    console = Console(width=120)
    for one in results.get("kernel", []):
        seconds = one["seconds"]
        table = Table("method", "ms", "× one rfft2", "ours is faster by", title=f"{one['size']}² uint16, one thread")
        for name, value in seconds.items():
            table.add_row(
                name, f"{1e3 * value:.2f}", f"{value / seconds['rfft2']:.2f}", f"{value / seconds['match']:.0f}×"
            )
        console.print(table)
    for row in rows(results):
        console.print(*row)
    for name in ("bins", "codecs"):
        for one in results.get(name, []):
            console.print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in one.items()})
    if "profile" in results:
        console.print(profile_table(results["profile"]))


def profile_table(seconds):
    table = Table("step", "ms per frame", "floor", "ms per frame", title="A unit of 16 frames, one thread")
    for step, floor in FLOORS.items():
        table.add_row(step, f"{1e3 * seconds[step]:.2f}", floor or "–", f"{1e3 * seconds[floor]:.2f}" if floor else "–")
    return table


def rows(results):
    """Ratios of the run, each with what it is."""
    if "run" in results:
        ms = {name: 1e3 * value for name, value in results["run"]["seconds_per_frame"].items()}
        yield "ms per frame:", {name: round(value, 2) for name, value in ms.items()}
        yield "register / read:", round(ms["register"] / ms["read"], 2)
        yield "run, whole pixels / copy:", round(ms["whole_pixels"] / ms["copy"], 2)
        yield "run, cubic / copy of the same dtype:", round(ms["cubic"] / ms["copy_float"], 2)
        yield "peak memory / predicted:", round(results["run"]["peak_bytes"] / results["run"]["predicted_bytes"], 2)
    if "run" in results and "today" in results:
        ours = results["run"]["seconds_per_frame"]["cubic"]
        yield "today's way / ours, per frame:", round(results["today"]["seconds_per_frame"] / ours)
    if "growth" in results:
        few, many = (one["seconds_per_frame"] for one in results["growth"])
        lengths = " / ".join(str(one["frames"]) for one in reversed(results["growth"]))
        for name in many:
            yield f"{name}, per frame of {lengths} frames:", round(many[name] / few[name], 3)
        yield (
            "peak memory, many / few frames:",
            round(results["growth"][1]["peak_bytes"] / results["growth"][0]["peak_bytes"], 3),
        )
    if "start" in results:
        yield "seconds to the first result:", results["start"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--peers", type=int, default=2048, help="largest size that the peers see")
    parser.add_argument("--frames", type=int, default=128, help=f"frames of {SIZE}² in the run")
    parser.add_argument("--growth", type=int, default=100, help="by how much the stack grows")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; about 1 GB, 25 GB with growth")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(options, Path(folder))
    show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
