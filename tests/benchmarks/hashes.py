"""Hashes of everything that a set of small runs makes: run it before and after a change that must not move a bit.

Usage: python tests/benchmarks/hashes.py --write before.json      (with the code as it was)
       python tests/benchmarks/hashes.py --compare before.json    (with the code as it is; exit status 1 if any differ)

Only public names and the command line are used, so that the same script runs on both sides of a move. Hashes are those
of one kind of processor. Three are kept for each result: `pixels` (every chunk), `metadata` (attributes and layouts of
the stores, where words may change) and `values` (numbers of the lazy forms).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import xarray as xr
import zarr

import stillframe as sf

FRAMES, UNIT = 20, 8
STORES = ("reference.zarr", "shifts.zarr", "aligned.zarr")


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:20]


def hash_files(folder: Path, keep) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and keep(file))
    return digest(*(str(file.relative_to(folder)).encode() + file.read_bytes() for file in files))


def hash_run(out: Path) -> dict[str, str]:
    found = {}
    for store in STORES:
        if (out / store).exists():
            found[f"{store} pixels"] = hash_files(out / store, lambda file: file.name != "zarr.json")
            found[f"{store} metadata"] = hash_files(out / store, lambda file: file.name == "zarr.json")
    return found


def hash_dataset(dataset: xr.Dataset) -> dict[str, str]:
    values = (dataset[name].values for name in sorted(dataset.variables) if dataset[name].dtype.kind != "O")
    return {"values": digest(*(np.ascontiguousarray(one).tobytes() for one in values))}


def simulate(
    folder: Path, pattern: str, size: int = 192, frames: int = FRAMES, dose: float = 60.0
) -> tuple[Path, Path]:
    command = [sys.executable, "-m", "stillframe", "simulate", str(folder), "--frames", str(frames)]
    options = {"height": size, "width": size, "pattern": pattern, "dose": dose, "max-drift": 6, "dark-every": 9}
    subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in options.items())], check=True, capture_output=True
    )
    return folder / "frames.zarr", folder / "mask.npy"


def run(frames: Path, mask: Path | None, out: Path, **settings) -> dict[str, str]:
    given = {"max_shift": 12, "unit_frames": UNIT, "workers": 0} | settings
    sf.run(sf.Settings(frames=frames, mask=mask, out=out, **given))
    return hash_run(out)


def stored(folder: Path, values: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    array = zarr.create_array(
        folder / "frames.zarr", shape=values.shape, dtype=values.dtype, chunks=(1, *values.shape[1:])
    )
    array[:] = values
    return folder / "frames.zarr"


def patterns_and_options(work: Path, made: dict[str, tuple[Path, Path]]):
    for pattern, (frames, mask) in made.items():
        yield f"{pattern} default", run(frames, mask, work / f"{pattern}-default")
        yield f"{pattern} cubic", run(frames, mask, work / f"{pattern}-cubic", interpolation="cubic")
    frames, mask = made["rings"]
    yield "rings linear", run(frames, mask, work / "linear", interpolation="linear")
    yield "rings lanczos", run(frames, mask, work / "lanczos", interpolation="lanczos", fill=-1)
    yield "rings whole pixels", run(frames, mask, work / "whole", subpixel=False)
    yield "rings one frame", run(frames, mask, work / "one", reference="3")
    yield "rings kind", run(frames, mask, work / "kind", reference_kind="unpumped", reference_iterations=1)
    yield "rings plain mean", run(frames, mask, work / "mean", reference="0:10", reference_iterations=0)
    yield "rings without a mask", run(frames, None, work / "unmasked", reference="2")
    yield "rings unaligned", run(frames, mask, work / "unaligned", align=False)
    yield "rings small window", run(frames, mask, work / "edge", max_shift=3)
    yield "rings saturated", run(frames, mask, work / "saturated", saturation=55)
    yield "rings two workers", run(frames, mask, work / "workers", workers=2)


def large(work: Path):
    """Big enough that searches go through bins, with a hit and a lattice that is ambiguous."""
    frames, mask = simulate(work / "large", "spots", size=1024, frames=6, dose=200.0)
    yield "large spots", run(frames, mask, work / "large-run", max_shift=24, unit_frames=3)
    y, x = np.mgrid[:256, :256]
    expected = 40 * np.exp(-((y % 18 - 9) ** 2 + (x % 18 - 9) ** 2) / 8) + 2
    lattice = np.random.default_rng(5).poisson(
        np.stack([np.roll(expected, move, (0, 1)) for move in [(0, 0), (2, 1), (4, 3)]])
    )
    yield "lattice", run(stored(work / "lattice", lattice.astype(np.uint16)), None, work / "lattice-run", reference="0")


def dtypes(work: Path, frames: Path, mask: Path):
    values = zarr.open_array(frames / "frames", mode="r")[:]
    for dtype in ("u1", "i2", "u4", "i4", "f4", "f8", ">u2", ">f4"):
        scaled = np.minimum(values, 250) if dtype == "u1" else values
        if np.dtype(dtype).kind == "f":
            scaled = scaled * 1.5 + 100.25
        path = stored(work / f"dtype-{dtype.replace('>', 'big')}", scaled.astype(dtype))
        yield (
            f"dtype {dtype}",
            run(path, mask, path.parent / "run", interpolation="nearest" if dtype[0] != "f" else "cubic"),
        )


def hurt(work: Path, frames: Path, mask: Path):
    """Frames with NaN, saturation, hits, a damaged chunk."""
    values = zarr.open_array(frames / "frames", mode="r")[:].astype("f4")
    values[3, 50, 60] = np.nan
    values[4, 20:24, 30] = 5e4
    values[5] = 7
    path = stored(work / "hurt", values)
    chunk = path / "c" / "7" / "0" / "0"
    chunk.write_bytes(b"not a chunk")
    yield "hurt", run(path, mask, work / "hurt" / "run")


def life(work: Path, frames: Path, mask: Path):
    """Parts, appended, resumed after a loss, and with another setting."""
    whole = work / "parts"
    for part in (2, 3, 1):
        command = [sys.executable, "-m", "stillframe", "run", str(frames), "--mask", str(mask), "--out", str(whole)]
        command += ["--max-shift=12", f"--unit-frames={UNIT}", f"--shard={part}/3"]
        subprocess.run(command, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "stillframe", "gather", str(whole)], check=True, capture_output=True)
    yield "parts", hash_run(whole)
    out = work / "resumed"
    run(frames, mask, out)
    records = sorted((out / "units" / "align").glob("*.json"))
    records[1].unlink()
    shutil.rmtree(out / "aligned.zarr" / "frames" / "c" / "0")
    yield "resumed", run(frames, mask, out)
    yield "resumed with another interpolation", run(frames, mask, out, interpolation="linear")
    values = zarr.open_array(frames / "frames", mode="r")[:]
    grown = stored(work / "grown", values[:12])
    run(grown, mask, work / "grown" / "run")
    array = zarr.open_array(grown, mode="r+")
    array.append(values[12:])
    yield "appended", run(grown, mask, work / "grown" / "run")


def lazy(frames: Path, mask: Path):
    stack, valid = sf.open_frames(frames, chunk_frames=UNIT), sf.load_mask(mask)
    for name, options in {
        "mean": {"iterations": 0},
        "iterated": {"iterations": 3},
        "kind": {"use": slice(2), "kind": "unpumped", "iterations": 0},
    }.items():
        reference = sf.make_reference(stack, valid, max_shift=12, **options)
        shifts = sf.register(stack, reference).compute(scheduler="synchronous")
        yield f"lazy {name}", hash_dataset(shifts)
        for interpolation in ("nearest", "cubic"):
            aligned = sf.align(stack, shifts, interpolation=interpolation).compute(scheduler="synchronous")
            yield f"lazy {name} {interpolation}", {"values": digest(aligned.values.tobytes())}
    ncc, *_ = sf.masked_ncc(stack[0].values, stack[3].values, valid, valid, max_shift=9)
    yield "masked_ncc", {"values": digest(ncc.tobytes())}
    masks = np.stack([np.roll(valid, 3, 0)] * 4)
    matches = sf.match_frames(stack[:4].values, reference, masks=masks)
    yield "own masks", {"values": digest(*(matches[name].tobytes() for name in matches.dtype.names))}


def selftest(work: Path, frames: Path, mask: Path):
    command = [sys.executable, "-m", "stillframe", "selftest", str(frames), "--mask", str(mask), "--max-shift=12"]
    subprocess.run([*command, "--count=20", f"--save={work / 'selftest.json'}"], check=True, capture_output=True)
    yield "selftest", {"values": digest((work / "selftest.json").read_bytes())}


def all_hashes(work: Path) -> dict[str, str]:
    made = {pattern: simulate(work / pattern, pattern) for pattern in ("rings", "spots")}
    parts = (
        patterns_and_options(work, made),
        large(work),
        dtypes(work, *made["rings"]),
        hurt(work, *made["rings"]),
        life(work, *made["rings"]),
        lazy(*made["rings"]),
        selftest(work, *made["spots"]),
    )
    return {f"{case}: {what}": value for part in parts for case, hashes in part for what, value in hashes.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        now = all_hashes(Path(folder))
    if given.write:
        given.write.write_text(json.dumps(now, indent=1) + "\n")
    if not given.compare:
        return 0
    before = json.loads(given.compare.read_text())
    different = [name for name in before | now if before.get(name) != now.get(name)]
    print(f"{len(now)} hashes, {len(different)} different", *different, sep="\n  ")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
