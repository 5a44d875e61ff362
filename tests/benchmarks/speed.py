"""How fast the kernel and a whole run are, beside what they cannot beat and what they replace, in one run.

    python tests/benchmarks/speed.py [--sizes 512 1024 2048 4096] [--frames 256] [--folder DIR] [--out speed.json]

Everything that is compared is timed in turn and each at its best, so that ratios hold on a noisy machine. Needs the
extra ``benchmark``. ``--parts`` chooses some of: kernel, bins, profile, codecs, run, today, growth, start.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
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
from numcodecs import blosc
from rich.console import Console
from rich.table import Table
from skimage.registration import phase_cross_correlation

from stillframe import Reference, Settings, match_frames
from stillframe.bins import bin_sums, in_single
from stillframe.clusters import executor
from stillframe.frames import FrameSource, open_source
from stillframe.records import Ledger, Seal
from stillframe.refine import refine
from stillframe.resample import resample_frames
from stillframe.scene import Experiment
from stillframe.search import statistics
from stillframe.simulate import simulate
from stillframe.store import ReferenceFile, aligned_encoding, save_reference, write_unit
from stillframe.tasks import AlignUnit, BothStages, RegisterUnit
from stillframe.units import Plan, make_plan, unit_memory

SIZE, MAX_SHIFT = 2048, 32
PARTS = ("kernel", "bins", "profile", "codecs", "run", "today", "growth", "start")
PACKAGES = ("stillframe", "numpy", "scipy", "numba", "zarr", "dask", "scikit-image", "itk-filtering")


def scene(size, frames=40):
    return Experiment(frames=frames, shape=(size, size), dead_pixels=1000 / size**2, seed=11)


def clock(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def best_in_turn(works, repeats):
    """Shortest time of each, seconds, all of them gone through again and again."""
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work))
    return {name: min(some) for name, some in times.items()}


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


def kernel(size, peers):
    """Times of one match of one frame, seconds."""
    experiment = scene(size)
    mask, fixed, frame = experiment.detector.mask, experiment.render(0), experiment.render(30)
    reference = Reference(fixed, mask, max_shift=MAX_SHIFT)
    whole = replace(reference, subpixel=False)
    works = {
        "rfft2": lambda: scipy.fft.rfft2(frame.astype(np.float32)),
        "match": lambda: match_frames(frame[None], reference),
        "whole_pixels": lambda: match_frames(frame[None], whole),
    }
    prepared = clock(works["match"])
    works["whole_pixels"]()
    times = best_in_turn(works, 15) | {"first_match": prepared}
    if peers:
        times["scikit_image"] = clock(
            lambda: phase_cross_correlation(fixed, frame, reference_mask=mask, moving_mask=mask, overlap_ratio=0.3)
        )
        times["itk"] = clock(itk_registration(fixed, frame, mask))
    found, truth = match_frames(frame[None], reference)[0], experiment.shifts[30] - experiment.shifts[0]
    shifts = {"found": [float(found["dy"]), float(found["dx"])], "true": truth.tolist(), "flag": int(found["flag"])}
    return {"size": size, "seconds": times, **shifts}


def bins(frames=20):
    """In which bins the whole-pixel peak of frames was beyond doubt, by pattern and dose; 1 is the exact search."""
    counts = []
    for pattern, dose in product(("rings", "spots"), (200, 20, 2)):
        experiment = Experiment(frames=frames + 1, shape=(SIZE, SIZE), pattern=pattern, dose=dose, seed=12)
        mask = experiment.detector.mask
        reference = Reference(experiment.render(0), mask, max_shift=MAX_SHIFT)
        settled = Counter()
        for index in range(1, frames + 1):
            frame = experiment.render(index)
            seen = statistics(frame, mask, np.inf)
            single = in_single(frame, seen.mean, seen.deviation)
            settled[next((one.factor for one in reference.coarse if one.find(single)), 1)] += 1
        counts.append({"pattern": pattern, "dose": dose, **{str(factor): settled[factor] for factor in (8, 4, 1)}})
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


def profile(source, reference, folder):
    """Where a unit's time goes, milliseconds a frame on one thread, each step beside a floor."""
    frames = source.read(Plan(source.shape[0], 16).units[0]).frames
    frame, mask = frames[0], reference.frame_mask
    matches = match_frames(frames, reference)
    moves = np.stack([matches["dy"], matches["dx"]], axis=1)
    seen = statistics(frame, mask, np.inf)
    single = in_single(frame, seen.mean, seen.deviation)
    peak = reference.find_peak(frame, single, seen)
    fine = refine(single, mask, peak.shift, reference.template, reference.steps, peak.slack)
    packed, out = blosc.compress(frame, b"lz4", 5, blosc.BITSHUFFLE), np.empty_like(frame)
    unit = Plan(len(frames), len(frames)).units[0]
    path = folder / "profile" / "aligned.zarr"
    encoding = aligned_encoding(frames.shape, len(frames), 0, frames.dtype)
    encoding["config"] = {"write_empty_chunks": encoding.pop("write_empty_chunks")}
    zarr.create_array(path / "frames", shape=frames.shape, dtype=frames.dtype, overwrite=True, **encoding)
    (seal,) = write_unit(path, unit, frames)
    works = {
        "decode": lambda: blosc.decompress(packed),
        "statistics": lambda: statistics(frame, mask, np.inf),
        "whole-pixel peak": lambda: reference.find_peak(frame, single, seen),
        "refine": lambda: refine(single, mask, peak.shift, reference.template, reference.steps, peak.slack),
        "score": lambda: reference.score(fine.start, single, seen, mask, fine.product),
        "whole match": lambda: match_frames(frame[None], reference),
        "lay, whole pixels": lambda: resample_frames(frame[None], moves[:1], mask, interpolation="nearest"),
        "lay, cubic": lambda: resample_frames(frame[None], moves[:1], mask, interpolation="cubic"),
        "encode": lambda: blosc.compress(frame, b"lz4", 5, blosc.BITSHUFFLE),
        "one copy of a frame": lambda: np.copyto(out, frame),
        "one pass over frame and mask": lambda: bin_sums(frame, mask, 0.0, 8),
    }
    times = best_in_turn(works, 15)
    sealed = folder / "profile" / seal
    whole = {"write a unit": lambda: write_unit(path, unit, frames), "checksum": lambda: Seal.of(sealed)}
    return times | {name: seconds / len(frames) for name, seconds in best_in_turn(whole, 5).items()}


@dataclass(frozen=True)
class Read:
    """Read and decode a unit."""

    source: FrameSource

    def __call__(self, work):
        return float(self.source.read(work[0]).frames[0, 0, 0])


@dataclass(frozen=True)
class Register:
    """Register a unit as the run does."""

    source: FrameSource
    reference: ReferenceFile
    folder: Path

    def __call__(self, work):
        self.reference.load()
        RegisterUnit(self.source, self.reference, self.folder).record(*work, self.source.read(work[0]))


@dataclass(frozen=True)
class Copy:
    """Copy a unit as the run writes it."""

    source: FrameSource
    folder: Path
    dtype: str

    def __call__(self, work):
        write_unit(self.folder / "aligned.zarr", work[0], self.source.read(work[0]).frames.astype(self.dtype))


def peak_memory():
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stages:
    """The stages of a run and the copies they are compared with, on one cluster."""

    def __init__(self, workers, source, reference, folder):
        self.workers, self.source, self.folder = workers, source, folder
        save_reference(reference, folder / "reference.zarr")
        self.stored = ReferenceFile(folder / "reference.zarr", reference.digest)
        self.layout = source.layout
        self.plan = make_plan(self.layout, budget=workers.budget, output_itemsize=2, max_shift=MAX_SHIFT)
        self.items = [(unit, "") for unit in self.plan.units]
        Ledger(folder).prepare()

    def all(self, work, items=None):
        for _, outcome in self.workers.results(work, items or self.items):
            if isinstance(outcome, BaseException):
                raise outcome

    def make(self, name, dtype):
        path = self.folder / name / "aligned.zarr"
        encoding = aligned_encoding(self.source.shape, self.plan.unit_frames, 0, np.dtype(dtype))
        encoding["config"] = {"write_empty_chunks": encoding.pop("write_empty_chunks")}
        zarr.create_array(path / "frames", shape=self.source.shape, dtype=dtype, overwrite=True, **encoding)
        Ledger(self.folder / name).prepare()
        return self.folder / name

    def read(self):
        self.all(Read(self.source))

    def copy(self, dtype):
        self.all(Copy(self.source, self.make("copy", dtype), dtype))

    def register(self):
        self.all(Register(self.source, self.stored, self.folder))

    def both(self, interpolation, dtype):
        folder = self.make("run", dtype)
        register = RegisterUnit(self.source, self.stored, folder)
        align = AlignUnit(self.source, self.stored, folder, interpolation, 0.0)
        self.all(BothStages(register, align), [(unit, "", {}) for unit in self.plan.units])


def stages(source, reference, folder, workers, repeats, names=None):
    """Times of the stages over all units, seconds, and the workers' memory, bytes."""
    settings = Settings(frames=source.path, out=folder / "run", workers=workers)
    with executor(settings) as cluster:
        one = Stages(cluster, source, reference, folder)
        works = {
            "read": one.read,
            "register": one.register,
            "copy": lambda: one.copy("uint16"),
            "whole_pixels": lambda: one.both("nearest", "uint16"),
            "copy_float": lambda: one.copy("float32"),
            "cubic": lambda: one.both("cubic", "float32"),
        }
        one.register()
        times = best_in_turn({name: works[name] for name in names or works}, repeats)
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
    with executor(settings):
        stack = da.from_zarr(str(source.path))[:frames].rechunk((1, -1, -1))
        laid = stack.map_blocks(register_block, fixed, mask, dtype=np.float32)
        seconds = clock(lambda: da.to_zarr(laid, str(folder / "today.zarr"), overwrite=True))
    return {"frames": frames, "workers": workers, "seconds_per_frame": seconds / frames}


def linked(store, times, folder):
    """A store so many times as long, its shards hard links."""
    source = open_source(store)
    array, shard = source.array, source.array.shards[0]
    whole = source.shape[0] // shard
    path = folder / "long.zarr" / "frames"
    long = zarr.create_array(
        path,
        shape=(whole * shard * times, *source.shape[1:]),
        dtype=source.dtype,
        chunks=array.chunks,
        shards=array.shards,
        compressors=array.compressors,
        dimension_names=("frame", "y", "x"),
        overwrite=True,
    )
    for number in range(whole * times):
        old, new = (
            where / one.metadata.encode_chunk_key((place, 0, 0))
            for where, one, place in ((source.path, array, number % whole), (path, long, number))
        )
        new.parent.mkdir(parents=True, exist_ok=True)
        os.link(old, new)
    return open_source(path)


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
        "growth": lambda: [
            stages(linked(store, times, folder), reference, folder, options.workers, 1) for times in (1, options.growth)
        ],
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
    for name, seconds in results.get("profile", {}).items():
        console.print(f"{name:30} {1e3 * seconds:6.2f} ms")


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
        for name in ("read", "register"):
            yield (
                f"{name}, per frame of {results['growth'][1]['frames']} / {results['growth'][0]['frames']} frames:",
                (round(many[name] / few[name], 3)),
            )
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
    parser.add_argument("--frames", type=int, default=64, help=f"frames of {SIZE}² in the run")
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
