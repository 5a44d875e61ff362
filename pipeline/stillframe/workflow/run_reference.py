"""The reference of a run: made from frames, taken from a file, or kept from the run that began in the folder."""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillframe.errors import OtherVersion
from stillframe.flags import Flag
from stillframe.images.arrays import Image, Mask, as_mask
from stillframe.images.noise import Noise
from stillframe.log import warn
from stillframe.partition import Unit
from stillframe.registration.build_reference import LITTLE_DRIFT, build_reference
from stillframe.registration.match import match_frames
from stillframe.registration.reference import Reference
from stillframe.registration.reference_frames import chosen_frames, frames_of_kind
from stillframe.settings import Settings
from stillframe.simulation.selftest import measure_frame
from stillframe.storage.checksums import digest_of, fingerprint
from stillframe.storage.coordinates import frame_coordinates
from stillframe.storage.frames import FrameSource, Reading
from stillframe.storage.pictures import load_image, load_mask
from stillframe.storage.reference_store import load_reference
from stillframe.versions import KERNEL_VERSION
from stillframe.workflow.run_folder import Origin, RunDescription, RunFolder

CorrectionImages = dict[str, npt.NDArray[Any]]
"""Dark and flat (y, x), by these names, as far as they are given."""

_TRIED_FRAMES = 16
"""Frames that are matched with a new reference."""
_LEAST_USABLE = 4
"""With fewer of them usable nothing is said."""
_LEAST_FIT = 0.1
"""A smaller fraction of the usable ones stops the run."""
_FEW_VALID = 0.1
"""A mask with a smaller fraction of valid pixels may be inverted."""
_SCATTERED = 16
"""So many valid pixels without a valid neighbour in such a mask: it is inverted."""
_NOISE_FRAMES = 9
"""Frames whose noise is measured."""


def prepare_reference(settings: Settings, source: FrameSource) -> tuple[Reference, Origin | None]:
    """Make the reference that the settings ask for, or keep the one with which the run in this folder began.

    Frames that cannot be read are reported and left out. Where no frames are named, those from which the reference was
    made stay its frames, however the stack has grown. A new reference that hardly any frame fits raises ``ValueError``.

    Returns
    -------
    Reference, Origin or None
        What it was made from; None for a reference that comes from a file.
    """
    mask = None if settings.mask is None else load_mask(settings.mask)
    images = _correction_images(settings)
    use = requested_frames(settings.reference)
    if isinstance(use, Path):
        return _of_same_shape(_from_file(use, mask, images, settings), source), None
    indices = reference_indices(settings, source)
    valid = as_mask(mask, source.shape[1:])
    before = _origin_before(RunFolder(settings.out))
    named = None if use is None else [indices[place] for place in chosen_frames(use, len(indices))]
    frames = sorted(set(before.frames) & set(indices)) if before and named is None else named or []
    origin = _origin(settings, source, frames, valid, images, use)
    kept = _kept(RunFolder(settings.out), before, origin)
    if kept:
        return kept
    _check_not_inverted(valid)
    made = _made(settings, source, indices, use, valid, images, origin)
    _report_invalid(made[0], valid)
    _refuse_without_fit(made[0], source, list(made[1].frames), masked=settings.mask is not None)
    return made


def corrects(settings: Settings) -> bool:
    """Return whether a run corrects its frames, without reading an image."""
    stored = requested_frames(settings.reference)
    brings = isinstance(stored, Path) and any((stored / name / "zarr.json").exists() for name in ("dark", "flat"))
    return settings.dark is not None or settings.flat is not None or brings


def _correction_images(settings: Settings) -> CorrectionImages:
    """Load the dark and the flat that the settings name."""
    return {
        name: load_image(path, (name,))
        for name, path in (("dark", settings.dark), ("flat", settings.flat))
        if path is not None
    }


def _report_invalid(reference: Reference, mask: Mask) -> None:
    """Report valid pixels that no frame can use."""
    if lost := np.count_nonzero(mask & ~reference.frame_mask):
        warn(
            f"{lost} of {np.count_nonzero(mask)} valid pixels are left out: they are hot, dead or saturated, do not "
            "follow the pattern, or have no usable dark or flat. They are invalid in reference.zarr, too."
        )


def _check_not_inverted(mask: Mask) -> None:
    """Warn of a mask with few valid pixels; raise ``ValueError`` if these are scattered, as bad pixels are."""
    valid = np.count_nonzero(mask) / mask.size
    if valid >= _FEW_VALID:
        return
    height, width = mask.shape
    padded = np.pad(mask, 1).astype(np.int8)
    around = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    alone = int(np.count_nonzero(mask & (around == 1)))
    got = f"only {valid:.1%} of the pixels are valid by the mask"
    advice = "invert it: True, or non-zero, means valid."
    if alone >= _SCATTERED:
        raise ValueError(
            f"{got}, and {alone} of them stand alone, as hot and dead pixels do: the mask seems to mark the pixels to "
            f"be left out, so {advice}"
        )
    warn(f"{got}. If it marks the pixels to be left out instead, {advice}")


def _refuse_without_fit(reference: Reference, source: FrameSource, made_of: Sequence[int], *, masked: bool) -> None:
    """Raise ``ValueError`` if hardly any frame with beam fits the reference; tried are some, spread over the stack.

    The frames that the reference is made of always fit. They are tried only if there are fewer than four others.
    """
    reader = _Reader(source, quiet=True)
    fits = usable = 0
    others = np.setdiff1d(np.arange(source.shape[0]), made_of)
    asked = others if len(others) >= _LEAST_USABLE else np.arange(source.shape[0])
    for index in asked[np.unique(np.linspace(0, len(asked) - 1, _TRIED_FRAMES).astype(int))]:
        for match in match_frames(reader([int(index)]), reference):
            usable += not match["flag"] & (Flag.DARK | Flag.CORRUPT | Flag.SATURATED)
            fits += bool(np.isfinite(match["dy"]))
    if usable >= _LEAST_USABLE and fits < _LEAST_FIT * usable:
        check = "the mask (True must mean valid; is it inverted?)" if masked else "whether a --mask is needed"
        raise ValueError(
            f"of {usable} frames with beam, spread over the stack, {fits} fit the reference ({reference.history}): it "
            f"shows no pattern that they have, or they moved farther than {reference.max_shift} px. Look at {check}, "
            'at --max-shift, and at --reference, which names frames that show the pattern, such as "100:116".'
        )


def reference_indices(settings: Settings, source: FrameSource) -> Sequence[int]:
    """Return the frames of which the reference may be made."""
    kinds = frame_coordinates(source).get("kind") if settings.reference_kind else None
    return frames_of_kind(settings.reference_kind, None if kinds is None else kinds.values, source.shape[0])


def requested_frames(reference: str | None) -> int | slice | Path | None:
    """Parse "7" or "0:16" as Python does; anything else is a path.

    Examples
    --------
    >>> requested_frames("7"), requested_frames("0:16")
    (7, slice(0, 16, None))
    """
    if reference is None:
        return None
    if re.fullmatch(r"-?\d+", reference):
        return int(reference)
    if re.fullmatch(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?", reference):
        return slice(*(int(part) if part else None for part in reference.split(":")))
    return Path(reference).expanduser()


def _origin(
    settings: Settings,
    source: FrameSource,
    frames: Sequence[int],
    mask: Mask,
    images: CorrectionImages,
    use: int | slice | None,
) -> Origin:
    """Describe what a reference from these frames would be made from now."""
    facts = settings.search.model_dump() | {
        "kernel": KERNEL_VERSION,
        "array": source.decoding_metadata(),
        "missing": source.missing_chunks,
        "iterations": settings.reference_iterations,
        "detector_map": settings.detector_map,
        "one": isinstance(use, int),
        "spread": use is None,
        "kind": settings.reference_kind,
        "mask": digest_of(mask),
    }
    facts |= {name: digest_of(image) for name, image in images.items()}
    contents = settings.input_check == "contents"
    return Origin(settings=fingerprint(facts), frames={index: _token(source, index, contents) for index in frames})


def _token(source: FrameSource, index: int, contents: bool) -> str | None:
    """Return the fingerprint of the files of a frame; None where one that matters is missing."""
    files = source.identity(index, index + 1, contents=contents)
    lost = source.missing_chunks == "report" and any(size < 0 for _, size, _ in files)
    return None if lost else fingerprint({"files": files})


def _origin_before(folder: RunFolder) -> Origin | None:
    """Return what the reference of the run in this folder was made from; None for a new run, or if it is a file."""
    description = RunDescription.read(folder.description)
    return description.origin if description else _origin_in_store(folder.reference)


def _kept(folder: RunFolder, before: Origin | None, now: Origin) -> tuple[Reference, Origin] | None:
    """Return the reference with which this run began, if it would be made from the same frames and settings now."""
    if before is None or not before.holds(now):
        return None
    try:
        reference = load_reference(folder.reference)
    except OtherVersion:
        raise
    except ValueError:
        return None
    if reference.digest != before.digest:
        return None
    if before.history != reference.history:  # damaged: everything else is in the hash
        reference = reference.replace(history=before.history)
    if before.returned(now):
        warn(
            f"the reference stays as it was made, without the frames {before.returned(now)}, which could not be read "
            f"then. To make it again with them, and do every unit again, remove {folder.reference}."
        )
    return reference, before


def _origin_in_store(reference: Path) -> Origin | None:
    """Return what a stored reference was made from, as it says itself; needed where ``run.json`` is damaged."""
    try:
        return Origin.model_validate(json.loads((reference / "zarr.json").read_bytes())["attributes"]["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _made(
    settings: Settings,
    source: FrameSource,
    indices: Sequence[int],
    use: int | slice | None,
    mask: Mask,
    images: CorrectionImages,
    origin: Origin,
) -> tuple[Reference, Origin]:
    reader = _Reader(source, settings.input_check == "contents")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            options = settings.search.model_dump() | images
            rounds: dict[str, Any] = {
                "iterations": settings.reference_iterations,
                "detector_map": settings.detector_map,
            }
            reference = build_reference(reader, indices, mask, use=use, **rounds, **options)
    except ValueError as error:
        if not reader.lost or source.missing_chunks == "fill":
            raise
        raise ValueError(f"{error} If their writer leaves out empty chunks, give --missing-chunks fill.") from error
    for one in caught:
        warn(str(one.message))
    if LITTLE_DRIFT in reference.history:
        missing = [name for name in ("mask", "dark", "flat") if getattr(settings, name) is None]
        cure = f"give --{', --'.join(missing)}" if missing else "look whether the mask leaves all of it out"
        warn(
            f"the reference is a {reference.history}. If the beam did drift, all frames show something that stays on "
            f"the detector: {cure}."
        )
    made: dict[str, Any] = {"digest": reference.digest, "history": reference.history}
    if use is None:
        made["frames"] = dict(sorted(reader.tokens.items()))
    return reference, origin.model_copy(update=made).without(reader.lost)


@dataclass(frozen=True)
class _Reader:
    """Reads frames one by one, and reports those that cannot be read."""

    source: FrameSource
    contents: bool = False
    """Whether files are identified by checksums of their contents."""
    lost: set[int] = field(default_factory=set)
    quiet: bool = False
    """Whether nothing is reported and no fingerprint taken: these frames do not enter the reference."""
    tokens: dict[int, str | None] = field(default_factory=dict)
    """Fingerprint of the files of each frame before it was first read."""

    def __call__(self, indices: Sequence[int]) -> npt.NDArray[Any]:
        """Return the frames that can be read (frame, y, x)."""
        for index in indices:
            if index not in self.tokens and not self.quiet:
                self.tokens[index] = _token(self.source, index, self.contents)
        readings = [self.source.read(Unit(0, index, index + 1)) for index in indices]
        for index, reading in zip(indices, readings, strict=True):
            self._report(index, reading)
        return np.concatenate([reading.frames[~reading.damaged] for reading in readings])

    def _report(self, index: int, reading: Reading) -> None:
        """Report a frame that cannot be read, once."""
        for problem in reading.problems if index not in self.lost and not self.quiet else ():
            warn(f"left out of the reference: {problem}")
            self.lost.add(index)


def _from_file(path: Path, mask: Mask | None, images: CorrectionImages, settings: Settings) -> Reference:
    """Return the reference in a file; a reference.zarr brings its dark and flat, unless others are given."""
    kind, options = settings.reference_kind, settings.search.model_dump() | images
    if kind is not None:
        raise ValueError(
            f"frames of the kind {kind!r} were asked for as reference, but also the file {path}: only one of them can "
            "be the reference. Leave out --reference or --reference-kind."
        )
    if (path / "image" / "zarr.json").exists():
        return _with_mask(load_reference(path), path, mask, images).replace(**options)
    image = load_image(path)
    return Reference(image, as_mask(mask, image.shape), **options)


def _with_mask(stored: Reference, path: Path, mask: Mask | None, images: CorrectionImages) -> Reference:
    """Return a stored reference without the pixels that a mask leaves out; warn where it was made with other images."""
    now = stored.replace(**images)
    for name in images:
        if getattr(stored, name) is None:
            warn(
                f"{path} was made without a {name}: its image stays as it is, and only frames are corrected. To make "
                "a reference of corrected frames, name frames by --reference."
            )
        elif digest_of(getattr(stored, name)) != digest_of(getattr(now, name)):
            warn(
                f"{path} was made with another {name}: its image stays as it is, and frames are corrected with the "
                f"{name} that is given. To use the one of the reference, which includes what was measured of the "
                f"detector, leave out --{name}."
            )
    if mask is None:
        return stored
    valid = as_mask(mask, stored.shape)
    if lost := np.count_nonzero(valid & ~stored.frame_mask):
        warn(
            f"{lost} of {np.count_nonzero(valid)} pixels that are valid by the mask are left out, because {path} marks "
            "them as invalid: by the mask that it was made with, or because they are bad."
        )
    return stored.replace(frame_mask=valid & stored.frame_mask)


def _of_same_shape(reference: Reference, source: FrameSource) -> Reference:
    if reference.shape != source.shape[1:]:
        raise ValueError(
            f"the reference has shape {reference.shape} but the frames have {source.shape[1:]}: they must come from "
            "the same detector. Crop or bin both alike."
        )
    return reference


def single_frames(source: FrameSource, reference: Reference) -> tuple[Noise, Image]:
    """Measure single frames, a few that are spread over the stack and show the pattern.

    Returns
    -------
    Noise
        The median of theirs.
    array, shape (y, x)
        What hot pixels have in excess of their surroundings in most of them.

    Raises
    ------
    ValueError
        None of them can be registered.
    """
    measured, excess = [], []
    for index in np.unique(np.linspace(0, source.shape[0] - 1, _NOISE_FRAMES).astype(int)):
        frames = _Reader(source)([int(index)])
        if len(frames) and not match_frames(frames, reference)["flag"][0]:
            noise, fixed = measure_frame(reference.correct(frames[0]), reference.frame_mask)
            measured.append(noise)
            excess.append(fixed.astype(np.float32))
    if not measured:
        raise ValueError("none of the frames fits the reference: check the mask, and which frames the reference is of.")
    return sorted(measured)[len(measured) // 2], np.median(excess, axis=0).astype(np.float64)
