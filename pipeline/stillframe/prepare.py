"""What a run needs before it starts, checked while nothing has been written yet."""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.average import chosen_frames, frames_of_kind
from stillframe.checks import as_mask
from stillframe.doors import is_private_folder
from stillframe.durable import digest_of
from stillframe.errors import NewerVersion
from stillframe.frames import FrameSource, Reading, frame_coordinates, load_image, load_mask, open_source
from stillframe.iterate import build_reference
from stillframe.leases import Holder, is_lease, refuse_second
from stillframe.match import match_frames
from stillframe.ncc import Mask
from stillframe.noise import Noise, measure_noise
from stillframe.origin import Origin, read_origin
from stillframe.plans import StoredPlan, read_plan, read_seals, read_stored_plan
from stillframe.progress import is_log, warn
from stillframe.reference import Reference
from stillframe.resample import output_dtype
from stillframe.settings import SETTINGS_VERSION, Settings, make_settings, read_toml
from stillframe.store import load_reference, refuse_newer_store
from stillframe.units import Plan, Unit, make_plan

_ENDLESS = 2**40
"""Frames of a stack that still grows."""
_MEASURED = 9
"""Frames whose noise is measured."""


def check_folder(settings: Settings, me: Holder | None = None) -> None:
    """See that the folder is new, empty, or that of a run on the same frames which nobody drives.

    Or nobody but those who do other parts of it than oneself.

    Raises
    ------
    ValueError
        A file, a folder of something else, of another run or of a newer version, or inside the frames.
    LeaseError
        Another driver works on it.
    """
    out, stored = settings.out, settings.out / "settings.toml"
    if out == settings.frames or settings.frames in out.parents:
        raise ValueError(f"{out} lies inside the frames {settings.frames}, which are only read. Choose another --out.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but a run needs a folder for its results. Choose another --out.")
    _refuse_newer(out)
    plan = read_stored_plan(out)
    if plan or stored.exists():
        _same_run(_settings_of(plan, stored), settings)
        refuse_second(out, me=me)
        return
    strange = sorted(path.name for path in out.glob("*") if not _own(path.name))
    if strange:
        raise ValueError(
            f"{out} holds {', '.join(strange[:3])}, which no run wrote: nothing of it is touched. "
            "Choose an empty or a new folder."
        )
    refuse_second(out, me=me)


def _own(name: str) -> bool:
    """Tell what a run that was killed at its very start leaves."""
    if is_lease(name) or is_private_folder(name) or (name.startswith(".") and name.endswith(".partial")):
        return True
    return name in (".lease.lock", ".lease.gate", ".parts.lock", ".drafts", "jobs") or is_log(name)


def _refuse_newer(out: Path) -> None:
    """Raise ``NewerVersion`` if any store in a run's folder is of a format that this package does not know."""
    read_seals(out)
    for name in ("reference.zarr", "shifts.zarr", "aligned.zarr"):
        try:
            attributes = json.loads((out / name / "zarr.json").read_bytes())["attributes"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(attributes, dict):
            refuse_newer_store(out / name, attributes)


def _settings_of(plan: StoredPlan | None, stored: Path) -> dict[str, Any] | None:
    """Return the settings of the run in this folder, None where both copies are damaged.

    The copy that has a checksum goes before the one to be read.
    """
    if plan and plan.settings:
        return plan.settings
    try:
        return read_toml(stored)
    except ValueError as error:
        warn(f"{error} It is written again; units of other frames, if there are any, are done again.")
        return None


def _same_run(before: dict[str, Any] | None, settings: Settings) -> None:
    if before is None:
        return
    version = before.get("version")
    if version != SETTINGS_VERSION:
        raise ValueError(
            f"{settings.out} was written with settings of version {version}, this is version {SETTINGS_VERSION}. "
            "Use the stillframe that wrote it, or another folder."
        )
    earlier = make_settings(before).frames
    if earlier != settings.frames:
        raise ValueError(
            f"{settings.out} holds the run of {earlier}, not of {settings.frames}: their results would mix. "
            "Choose another --out."
        )


def open_source_of(settings: Settings, *, empty: bool = False) -> FrameSource:
    """Open the frames that the settings name."""
    return open_source(settings.frames, missing_chunks=settings.missing_chunks, empty=empty)


def prepare_reference(settings: Settings, source: FrameSource) -> tuple[Reference, Origin | None]:
    """Make the reference the settings ask for, or take up the one this run began with.

    Frames that cannot be read are reported and left out.

    Returns
    -------
    Reference, Origin or None
        What it was made from; None for a reference that comes from a file.
    """
    mask = None if settings.mask is None else load_mask(settings.mask)
    options = {
        name: getattr(settings, name) for name in ("max_shift", "overlap_ratio", "saturation", "weights", "subpixel")
    }
    use = frames_asked(settings.reference)
    if isinstance(use, Path):
        return _same_shape(_reference_file(use, mask, settings.reference_kind, options), source), None
    indices = reference_indices(settings, source)
    valid = as_mask(mask, source.shape[1:])
    rest = {"iterations": settings.reference_iterations, "one": isinstance(use, int)}
    chosen = [indices[place] for place in chosen_frames(use, len(indices))]
    facts = options | rest | {"mask": digest_of(valid)}
    origin = Origin.of(source, chosen, facts, contents=settings.input_check == "contents")
    return _kept(settings.out, origin) or _made(settings, source, indices, use, valid, options, origin)


def reference_indices(settings: Settings, source: FrameSource) -> Sequence[int]:
    """Frames that the reference may be made of."""
    kinds = frame_coordinates(source).get("kind") if settings.reference_kind else None
    return frames_of_kind(settings.reference_kind, None if kinds is None else kinds.values, source.shape[0])


def _kept(out: Path, now: Origin) -> tuple[Reference, Origin] | None:
    """Return the reference that this run began with, if it would be made from the same now."""
    before = read_origin(out / "reference.json")
    if before is None or not before.holds(now):
        return None
    try:
        reference = load_reference(out / "reference.zarr")
    except NewerVersion:
        raise
    except ValueError:
        return None
    if reference.digest != before.digest:
        return None
    if before.history is not None and before.history != reference.history:  # damaged: all else is in the hash
        reference = replace(reference, history=before.history)
    if before.returned(now):
        warn(
            f"the reference stays as it was made, without the frames {before.returned(now)}, which could not be read "
            f"then. To make it anew with them, and do every unit again, remove {out / 'reference.json'}."
        )
    return reference, before


def _made(
    settings: Settings,
    source: FrameSource,
    indices: Sequence[int],
    use: int | slice | None,
    mask: Mask,
    options: dict[str, Any],
    origin: Origin,
) -> tuple[Reference, Origin]:
    reader = _Reader(source)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            reference = build_reference(
                reader, indices, mask, use=use, iterations=settings.reference_iterations, **options
            )
    except ValueError as error:
        if not reader.lost or source.missing_chunks == "fill":
            raise
        raise ValueError(f"{error} If their writer leaves out empty chunks, give --missing-chunks fill.") from error
    for one in told:
        warn(str(one.message))
    return reference, origin.without(reader.lost).model_copy(
        update={"digest": reference.digest, "history": reference.history}
    )


def frames_asked(wish: str | None) -> int | slice | Path | None:
    """Read "7" or "0:16" as Python does; anything else is a path."""
    if wish is None:
        return None
    if re.fullmatch(r"-?\d+", wish):
        return int(wish)
    if re.fullmatch(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?", wish):
        return slice(*(int(part) if part else None for part in wish.split(":")))
    return Path(wish).expanduser()


@dataclass(frozen=True)
class _Reader:
    """Reads the frames of some indices one by one, and tells which cannot be read."""

    source: FrameSource
    lost: set[int] = field(default_factory=set)

    def __call__(self, indices: Sequence[int]) -> npt.NDArray[Any]:
        """Return those that can be read (frame, y, x)."""
        readings = [self.source.read(Unit(0, index, index + 1)) for index in indices]
        for index, reading in zip(indices, readings, strict=True):
            self._tell(index, reading)
        return np.concatenate([reading.frames[~reading.damaged] for reading in readings])

    def _tell(self, index: int, reading: Reading) -> None:
        """Tell of a frame that cannot be read, once."""
        for problem in reading.problems if index not in self.lost else ():
            warn(f"left out of the reference: {problem}")
            self.lost.add(index)


def _reference_file(path: Path, mask: Mask | None, kind: str | None, options: dict[str, Any]) -> Reference:
    if kind is not None:
        raise ValueError(
            f"frames of the kind {kind!r} were asked for as reference, but also the file {path}: only one of them can "
            "be the reference. Leave out --reference or --reference-kind."
        )
    if (path / "image" / "zarr.json").exists():
        stored = load_reference(path)
        return replace(stored, frame_mask=stored.frame_mask if mask is None else mask, **options)
    image = load_image(path)
    return Reference(image, as_mask(mask, image.shape), **options)


def single_frame_noise(source: FrameSource, reference: Reference) -> Noise:
    """Measure the noise of single frames: the median of a few, spread over the stack, that show the pattern.

    Raises
    ------
    ValueError
        None of them can be registered.
    """
    found = []
    for index in np.unique(np.linspace(0, source.shape[0] - 1, _MEASURED).astype(int)):
        frames = _Reader(source)([int(index)])
        if len(frames) and not match_frames(frames, reference)["flag"][0]:
            found.append(measure_noise(frames[0].astype(np.float64), reference.frame_mask))
    if not found:
        raise ValueError("none of the frames fits the reference: check the mask, and which frames the reference is of.")
    return sorted(found)[len(found) // 2]


def _same_shape(reference: Reference, source: FrameSource) -> Reference:
    if reference.shape != source.shape[1:]:
        raise ValueError(
            f"the reference has shape {reference.shape} but the frames have {source.shape[1:]}: they must come from "
            "the same detector. Crop or bin both alike."
        )
    return reference


def prepare_plan(settings: Settings, source: FrameSource, budget: int) -> Plan:
    """Cut the stack into units: those of the earlier run in this folder, if there was one, so that its work counts.

    Of a stack that grows, whole units only.

    Raises
    ------
    ValueError
        A unit does not fit the workers' memory.
    """
    wish = settings.unit_frames or _kept_size(read_plan(settings.out), source.shape[0])
    layout = source.layout if source.limit is None else replace(source.layout, frames=_ENDLESS)
    plan = make_plan(
        layout,
        budget=budget,
        output_itemsize=output_dtype(source.dtype, settings.interpolation).itemsize,
        max_shift=settings.max_shift,
        unit_frames=wish,
    )
    plan = replace(plan, frames=_frames_to_do(source, plan.unit_frames, read_plan(settings.out)))
    if wish and plan.unit_frames < min(wish, layout.frames):
        raise ValueError(
            f"units of {wish} frames, as {'asked for' if settings.unit_frames else 'this run began with'}, do not fit "
            f"the workers' memory. Use fewer workers or more memory; --unit-frames {plan.unit_frames} begins anew."
        )
    if source.split:
        _tell_split(source, plan)
    return plan


def _frames_to_do(source: FrameSource, unit_frames: int, earlier: Plan | None) -> int:
    """Return all frames, or of a stack that grows those of whole units; but never fewer than an earlier run did."""
    frames = source.shape[0]
    if source.limit is None:
        return frames
    before = min(earlier.frames, source.array.shape[0]) if earlier else 0
    return max(frames - frames % unit_frames, int(before))


def _kept_size(earlier: Plan | None, frames: int) -> int | None:
    """Return the frames of a unit of the earlier run, unless it had but one unit and there are more frames now."""
    if earlier is None or (earlier.frames <= earlier.unit_frames and frames > earlier.frames):
        return None
    return earlier.unit_frames


def _tell_split(source: FrameSource, plan: Plan) -> None:
    advice = "." if plan.decodes == 1 else "; more memory per worker (--memory, --unit-frames) makes that fewer."
    warn(
        f"each frame is spread over several chunks {source.array.chunks}: units of {plan.unit_frames} frames are put "
        f"together in memory, and each chunk is decoded {plan.decodes}× per pass{advice}"
    )
