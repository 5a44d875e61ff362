"""Begin a run: check its folder, open the frames, prepare the reference, cut the stack into units.

Nothing is written here, so that input and settings that cannot be used leave no trace.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from stillframe.errors import OtherVersion
from stillframe.images.resample import check_fill, output_dtype
from stillframe.log import warn
from stillframe.partition import Plan, Unit, make_plan
from stillframe.registration.reference import Reference
from stillframe.settings import Settings, make_settings, read_toml
from stillframe.storage.checksums import digest_of, fingerprint
from stillframe.storage.frames import FrameSource, open_source
from stillframe.storage.shifts_store import refuse_newer_store
from stillframe.versions import KERNEL_VERSION, SETTINGS_VERSION
from stillframe.workflow.lease import Holder, refuse_second
from stillframe.workflow.ledger import FileIdentities, UnitRecord, known_plan
from stillframe.workflow.run_folder import Manifest, Origin, RunDescription, RunFolder
from stillframe.workflow.run_reference import corrects, prepare_reference
from stillframe.workflow.staleness import INPUT_FILES, Alignment, Dependencies

_MOST_LISTED = 256
"""Input files of a unit that a record lists one by one."""
_ENDLESS = 2**40
"""Frames of a stack that still grows."""


@dataclass(frozen=True, eq=False)
class RunDependencies:
    """What the results of all units of a run depend on."""

    source: FrameSource
    """The frames."""
    common: dict[str, str]
    """Dependencies that all units share, by name."""
    alignment: Alignment
    """The settings of the align stage."""
    contents: bool
    """Whether input files are identified by checksums of their contents, and not by their times."""

    @classmethod
    def of(cls, settings: Settings, source: FrameSource, reference: Reference, unit_frames: int) -> "RunDependencies":
        """Collect the dependencies of a run."""
        common = {name: str(value) for name, value in reference.options.model_dump().items()} | {
            "kernel version": str(KERNEL_VERSION),
            "mask": digest_of(reference.frame_mask),
            "reference": reference.digest,
            "layout of the frames": fingerprint({"metadata": source.decoding_metadata()}),
            "missing_chunks": source.missing_chunks,
        }
        images = {"dark": reference.dark, "flat": reference.flat}
        common |= {name: digest_of(image) for name, image in images.items() if image is not None}
        fill = check_fill(settings.fill, output_dtype(source.dtype, settings.interpolation))
        alignment = Alignment(settings.interpolation, fill, unit_frames)
        return cls(source, common, alignment, settings.input_check == "contents")

    def of_unit(self, unit: Unit, record: UnitRecord | None = None) -> tuple[Dependencies, list[str]]:
        """Return what a unit's registration depends on, and input files that are gone though it was made from them.

        Files that vanished after the unit was registered count as they were then: the result stays valid.
        """
        now = self.source.identity(unit.start, unit.stop, contents=self.contents)
        gone = [name for name, size, _ in now if size < 0]
        if gone and record and not record.problems:
            before = {name: (name, size, rest) for name, size, rest in record.inputs}
            merged = self._from_files(unit, [before.get(one[0], one) if one[1] < 0 else one for one in now])
            if merged.fingerprint == record.fingerprint:
                return merged, gone
        return self._from_files(unit, now), []

    def _from_files(self, unit: Unit, files: FileIdentities) -> Dependencies:
        own = {INPUT_FILES: fingerprint({"files": files}), "frames": f"{unit.start}–{unit.stop - 1}"}
        return Dependencies(self.common | own, files if len(files) <= _MOST_LISTED else [])


@dataclass(frozen=True, eq=False)
class RunInputs:
    """What a run works with."""

    settings: Settings
    source: FrameSource
    """The frames."""
    reference: Reference
    """What frames are compared with."""
    origin: Origin | None
    """What the reference was made from; None where it came from a file."""

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.settings.out)

    def dependencies(self, plan: Plan) -> RunDependencies:
        """Return what the results of all units depend on."""
        return RunDependencies.of(self.settings, self.source, self.reference, plan.unit_frames)


def open_source_of(settings: Settings, *, empty: bool = False) -> FrameSource:
    """Open the frames that the settings name; with ``empty``, there need not be one yet."""
    return open_source(settings.frames, missing_chunks=settings.missing_chunks, empty=empty)


def begin(settings: Settings, source: FrameSource | None = None) -> RunInputs:
    """Open the frames, unless they are given, and prepare the reference.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        Input or settings that cannot be used.
    """
    source = source or open_source_of(settings)
    reference, origin = prepare_reference(settings, source)
    check_fill(settings.fill, output_dtype(source.dtype, settings.interpolation))
    return RunInputs(settings, source, reference, origin)


def check_folder(settings: Settings, me: Holder | None = None) -> None:
    """Raise an error unless the folder is new, empty, or that of a run on the same frames without a living driver.

    Drivers of other parts than that of ``me`` are allowed.

    Raises
    ------
    ValueError
        A file, a folder of something else, of another run or of another version, or inside the frames.
    LeaseError
        Another driver works on it.
    """
    out, folder = settings.out, RunFolder(settings.out)
    if out == settings.frames or settings.frames in out.parents:
        raise ValueError(f"{out} lies inside the frames {settings.frames}, which are only read. Choose another --out.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but a run needs a folder for its results. Choose another --out.")
    _refuse_other_formats(folder)
    if folder.has_begun:
        _refuse_other_run(_earlier_settings(folder), settings)
    elif strangers := folder.strangers():
        raise ValueError(
            f"{out} holds {', '.join(strangers[:3])}, which no run wrote: nothing of it is touched. "
            "Choose an empty or a new folder."
        )
    refuse_second(folder, me=me)


def _refuse_other_formats(folder: RunFolder) -> None:
    """Raise ``OtherVersion`` if any file in a run's folder is of a format that this package does not read."""
    Manifest.read(folder.manifest)
    if (folder.path / "plan.json").exists() and not folder.description.exists():
        raise OtherVersion(
            f"{folder.path} was written by a stillframe that was never released. Choose another folder; nothing was "
            "changed."
        )
    for store in folder.stores:
        try:
            attributes = json.loads((store / "zarr.json").read_bytes())["attributes"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(attributes, dict):
            refuse_newer_store(store, attributes)


def _earlier_settings(folder: RunFolder) -> dict[str, Any] | None:
    """Return the settings of the run in this folder as they are stored; None where both copies are damaged."""
    if description := RunDescription.read(folder.description):
        return description.settings
    try:
        return read_toml(folder.settings)
    except (OSError, ValueError) as error:
        warn(f"{error} It is written again; units of other frames, if there are any, are done again.")
        return None


def _refuse_other_run(before: dict[str, Any] | None, settings: Settings) -> None:
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


def cut(settings: Settings, source: FrameSource, budget: int) -> Plan:
    """Cut the stack into units: those of the earlier run in this folder, if there was one, so that its work counts.

    Of a stack that grows, only whole units are taken.

    Raises
    ------
    ValueError
        A unit does not fit the workers' memory.
    """
    earlier = known_plan(RunFolder(settings.out))
    wish = settings.unit_frames or _kept_size(earlier, source.shape[0])
    layout = source.layout if source.limit is None else replace(source.layout, frames=_ENDLESS)
    plan = make_plan(
        layout,
        budget=budget,
        output_itemsize=output_dtype(source.dtype, settings.interpolation).itemsize,
        max_shift=settings.max_shift,
        unit_frames=wish,
        corrected=corrects(settings),
    )
    plan = replace(plan, frames=_frames_to_do(source, plan.unit_frames, earlier))
    if wish and plan.unit_frames < min(wish, layout.frames):
        raise ValueError(
            f"units of {wish} frames, as {'asked for' if settings.unit_frames else 'this run began with'}, do not fit "
            f"the workers' memory. Use fewer workers or more memory; --unit-frames {plan.unit_frames} begins anew."
        )
    if source.frames_split:
        _warn_of_split(source, plan)
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


def _warn_of_split(source: FrameSource, plan: Plan) -> None:
    advice = "." if plan.decodes == 1 else "; more memory per worker (--memory, --unit-frames) makes that fewer."
    warn(
        f"each frame is spread over several chunks {source.array.chunks}: units of {plan.unit_frames} frames are put "
        f"together in memory, and each chunk is decoded {plan.decodes}× per pass{advice}"
    )
