"""What each unit's results depend on, stage by stage, so that a change redoes just what it concerns."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from stillframe.durable import digest_of, fingerprint
from stillframe.frames import FrameSource
from stillframe.leases import Claim
from stillframe.match import KERNEL_VERSION
from stillframe.records import INPUT_FILES, MOST_INPUTS, Identity, Mark, fits
from stillframe.reference import Reference
from stillframe.resample import check_fill, output_dtype
from stillframe.settings import Settings
from stillframe.store import ReferenceFile
from stillframe.tasks import AlignUnit, Job, Moves
from stillframe.units import Plan, Unit

_LOOKING = 8
"""Threads that look at input files: on a shared file system each look is a journey."""
_SETTINGS = ("max_shift", "overlap_ratio", "saturation", "weights", "subpixel")


def marker_of(settings: Settings, source: FrameSource, reference: Reference, plan: Plan, claim: Claim) -> "Marker":
    """Put together what units depend on, with the job that their tasks share."""
    stored = ReferenceFile(claim.folder / "reference.zarr", reference.digest)
    job = Job(source, stored, claim, settings.input_check == "contents")
    fill = check_fill(settings.fill, output_dtype(source.dtype, settings.interpolation))
    align = AlignUnit(job, settings.interpolation, fill, plan.unit_frames)
    return Marker(reference, plan.units, plan.frames, align)


@dataclass(frozen=True, eq=False)
class Marker:
    """Tells what the results of each unit of a run depend on; looks at the input once."""

    reference: Reference
    """What frames are laid on, with its settings."""
    units: Sequence[Unit]
    """The units that are asked for."""
    frames: int
    """Frames of the stack."""
    align_unit: AlignUnit
    """The second stage, with its settings."""
    kept: list[str] = field(default_factory=list)
    """Input files that vanished after what is finished was made of them."""

    @property
    def source(self) -> FrameSource:
        """The frames."""
        return self.align_unit.job.source

    def register(self, unit: Unit) -> Mark:
        """Return what a unit's registration depends on."""
        return self._registered(unit, self._files[unit.number])

    def _registered(self, unit: Unit, files: Identity) -> Mark:
        facts = self._common | {INPUT_FILES: fingerprint({"files": files}), "frames": f"{unit.start}–{unit.stop - 1}"}
        return Mark(facts, files if len(files) <= MOST_INPUTS else [], self._older(unit, files))

    def align(self, unit: Unit, moves: Moves) -> Mark:
        """Return what a unit's aligned frames depend on."""
        registered = self.register(unit)
        mark = self.align_unit.mark(registered, moves)
        older = {
            "interpolation": self.align_unit.interpolation,
            "fill": mark.facts["fill"],
            "layout": (self.frames, self.align_unit.unit_frames),
            "shifts": mark.facts["shifts"],
        }
        return replace(mark, older=registered.older | older)

    @cached_property
    def _common(self) -> dict[str, str]:
        """Return what is the same for every unit."""
        settings = {name: str(getattr(self.reference, name)) for name in _SETTINGS}
        return settings | {
            "kernel version": str(KERNEL_VERSION),
            "mask": digest_of(self.reference.frame_mask),
            "reference": self.reference.digest,
            "layout of the frames": fingerprint({"metadata": self.source.meaning()}),
            "missing_chunks": self.source.missing_chunks,
        }

    @cached_property
    def _files(self) -> dict[int, Identity]:
        with ThreadPoolExecutor(_LOOKING) as pool:
            found = pool.map(self._identity, self.units)
            return {unit.number: files for unit, files in zip(self.units, found, strict=True)}

    @cached_property
    def _description(self) -> str:
        return self.source.description()

    def _identity(self, unit: Unit) -> Identity:
        """Look at a unit's files; those that vanished since they were registered are as they were then."""
        job = self.align_unit.job
        now = self.source.identity(unit.start, unit.stop, contents=job.contents)
        lost = [name for name, size, _ in now if size < 0]
        record = job.ledger.read("register", unit.number) if lost else None
        if record is None or record.problems:
            return now
        before = {name: (name, size, rest) for name, size, rest in record.inputs}
        merged = [before.get(name, (name, size, rest)) if size < 0 else (name, size, rest) for name, size, rest in now]
        if not fits(record, unit, self._registered(unit, merged)):
            return now
        self.kept.extend(lost)
        return merged

    def _older(self, unit: Unit, files: Identity) -> dict[str, Any]:
        """Return what records of format 1 hashed."""
        return {
            "kernel": KERNEL_VERSION,
            "reference": self.reference.digest,
            "array": self._description,
            "missing_chunks": self.source.missing_chunks,
            "files": files,
            "frames": (unit.start, unit.stop),
        }
