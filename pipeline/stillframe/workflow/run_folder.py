"""A run's folder: the name of everything in it; ``run.json``, how the run was begun; ``manifest.json``, how it ended.

Both JSON files end with their own checksum. A damaged ``run.json`` is written again, from ``settings.toml`` and the
unit records.
"""

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pydantic

from stillframe.cluster.security import is_private_folder
from stillframe.errors import OtherVersion
from stillframe.partition import Plan, Share
from stillframe.settings import Settings, make_settings, read_toml
from stillframe.storage.checksums import Checksum, has_checksum, with_checksum, without_checksum
from stillframe.storage.durable import store_files, write_durably
from stillframe.versions import RUN_VERSION

Stage = Literal["register", "align"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class _Name:
    """The path of one file or folder within a run's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: "RunFolder", _owner: object = None) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """Names of the files and folders of a run."""

    path: Path
    """The folder itself."""

    shifts = _Name("shifts.zarr")
    """Zarr store of the dataset of shifts."""
    aligned = _Name("aligned.zarr")
    """Zarr store of the aligned frames."""
    reference = _Name("reference.zarr")
    """Zarr store of the reference."""
    settings = _Name("settings.toml")
    """Settings for people to read; the program reads those in ``run.json``."""
    description = _Name("run.json")
    """How the run was begun."""
    manifest = _Name("manifest.json")
    """Checksums of the finished files; absent while a run is under way."""
    picture = _Name("shifts.png")
    """The drift, drawn."""
    drafts = _Name(".drafts")
    """Folder of shards that have not taken their place yet."""
    lease_lock = _Name(".lease.lock")
    """File that is locked by writers (shared) and by who changes a lease (exclusive)."""
    lease_gate = _Name(".lease.gate")
    """File that is locked on the way to the lease's lock, so that writers cannot keep that lock for ever."""
    parts_lock = _Name(".parts.lock")
    """File that is locked by the part that prepares the folder."""

    @property
    def stores(self) -> tuple[Path, ...]:
        """All Zarr stores of the run."""
        return self.reference, self.shifts, self.aligned

    def log(self, share: Share | None = None) -> Path:
        """Log of the run, or of one part of it.

        Examples
        --------
        >>> RunFolder(Path("run")).log(Share(3, 16)).name
        'run.3-of-16.log'
        """
        return self.path / (f"run.{share.number}-of-{share.of}.log" if share else "run.log")

    def records(self, stage: Stage) -> Path:
        """Folder of the unit records of one stage."""
        return self.path / "units" / stage

    def record(self, stage: Stage, unit: int) -> Path:
        """Record of one unit in one stage."""
        return self.records(stage) / f"{unit:06d}.json"

    def lease(self, share: str = "") -> Path:
        """Lease of the driver, or of a part such as "3/16"."""
        return self.path / (f"lease.{share.replace('/', '-of-')}.json" if share else "lease.json")

    @property
    def leases(self) -> list[Path]:
        """All leases that are there."""
        return sorted(self.path.glob("lease*.json"))

    @property
    def has_begun(self) -> bool:
        """Whether a run has written anything of its own here."""
        return self.description.exists() or self.settings.exists()

    def strangers(self) -> list[str]:
        """Names in the folder that no run writes."""
        return sorted(path.name for path in self.path.glob("*") if not self._is_own(path.name))

    def _is_own(self, name: str) -> bool:
        """Return True for what a run may have left when it was killed at its very start."""
        own = (self.lease_lock, self.lease_gate, self.parts_lock, self.drafts, self.log(), self.path / "jobs")
        patterns = (".*.partial", "run.*.log", "lease*.json")
        matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        return matches or name in {path.name for path in own} or is_private_folder(name)

    def has_files(self, files: Mapping[str, Checksum]) -> bool:
        """Return True if files of these names are there, with these sizes."""
        try:
            return all(os.stat(f"{self.path}/{name}").st_size == one.size for name, one in files.items())
        except OSError:
            return False

    def litter(self) -> Iterator[Path]:
        """Yield what writers that were killed left behind, except drafts of shards."""
        yield from self.path.glob(".*.json.*.partial")
        yield from self.aligned.glob(".*.partial")
        yield from (store.with_name(f".{store.name}.partial") for store in self.stores)


class Document(pydantic.BaseModel):
    """A JSON document of a run's folder, which ends with its own checksum."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    version: Literal[3] = RUN_VERSION
    """Version of this format."""

    def to_bytes(self) -> bytes:
        """Return the content of the document's file."""
        return with_checksum(self.model_dump_json().encode())

    def write(self, path: Path) -> None:
        """Write the document durably, unless exactly that is there already."""
        content = self.to_bytes()
        if not path.exists() or path.read_bytes() != content:
            write_durably(path, content)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the document in a file, or None where that is missing or damaged.

        Raises
        ------
        OtherVersion
            Another version of this package wrote it.
        """
        try:
            content = path.read_bytes()
        except OSError:
            return None
        return cls.parse(path, content)

    @classmethod
    def parse(cls, path: Path, content: bytes) -> Self | None:
        """Return the document in the content of a file, as :meth:`read` does."""
        try:
            return cls.model_validate_json(without_checksum(content))
        except ValueError:
            _refuse_other_version(path, content)
            return None


class Origin(pydantic.BaseModel):
    """The settings and the frames that a reference was made from.

    A resumed run keeps its reference. A mean that is registered again and again has other last bits on another kind of
    processor, and lacks a frame whose file was lost meanwhile; neither may put finished units out of date.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    settings: str
    """Fingerprint of the settings, the mask and the layout of the frames."""
    frames: dict[int, str | None]
    """Fingerprint of the files of each frame; None where it could not be read."""
    digest: str = ""
    """Hash of the reference that was made."""
    history: str = ""
    """How the reference was made, in words; not part of its hash."""

    def without(self, lost: set[int]) -> "Origin":
        """Return the same origin with some frames marked as unreadable."""
        return self.model_copy(update={"frames": self.frames | dict.fromkeys(lost)})

    def holds(self, now: "Origin") -> bool:
        """Return True if nothing was changed since; files that vanished or came back change nothing."""
        if (self.settings, self.frames.keys()) != (now.settings, now.frames.keys()):
            return False
        pairs = ((self.frames[index], now.frames[index]) for index in self.frames)
        return all(before == after or None in (before, after) for before, after in pairs)

    def returned(self, now: "Origin") -> list[int]:
        """Return the frames that could not be read when the reference was made and may be readable now."""
        return [index for index, token in self.frames.items() if token is None and now.frames[index] is not None]


class RunDescription(Document):
    """What ``run.json`` holds: how a run was begun."""

    frames: int = pydantic.Field(ge=1)
    """Frames of the stack."""
    unit_frames: int = pydantic.Field(ge=1)
    """Frames of a unit."""
    parts: int = 0
    """Into how many parts independent processes divide the run; 0 where one driver does all of it."""
    settings: dict[str, Any]
    """Settings of the last run, as in ``settings.toml``."""
    origin: Origin | None = None
    """What the reference was made from; None where it came from a file."""

    @classmethod
    def of(cls, plan: Plan, settings: Settings, origin: Origin | None, parts: int = 0) -> Self:
        """Describe a run that begins now."""
        given = settings.model_dump(mode="json", exclude_none=True)
        return cls(frames=plan.frames, unit_frames=plan.unit_frames, parts=parts, settings=given, origin=origin)

    @property
    def plan(self) -> Plan:
        """How the stack is cut into units."""
        return Plan(self.frames, self.unit_frames)

    @property
    def aligns(self) -> bool:
        """Whether frames are aligned, or only registered."""
        return self.settings.get("align", True) is not False


class Manifest(Document):
    """What ``manifest.json`` holds: checksums of the files of a finished run, except shards and records.

    Records hold their own checksum, and those of the shards.
    """

    files: dict[str, Checksum]
    """By name within the run's folder."""

    @classmethod
    def of(cls, folder: RunFolder) -> Self:
        """Measure the files of a run's folder as they are now."""
        single = [path for path in (folder.settings, folder.picture) if path.exists()]
        stored = [file for store in folder.stores if store.exists() for file in store_files(store)]
        return cls(files={str(file.relative_to(folder.path)): Checksum.of(file) for file in (*single, *stored)})

    def describes(self, folder: RunFolder, store: Path) -> bool:
        """Return True if every file of a store is as listed here, with none missing and none added."""
        listed = {name: checksum for name, checksum in self.files.items() if store in (folder.path / name).parents}
        there = {str(file.relative_to(folder.path)) for file in store.rglob("*") if file.is_file()}
        return there == listed.keys() and all(Checksum.of(folder.path / name) == one for name, one in listed.items())


def read_settings(folder: RunFolder) -> Settings:
    """Return the settings of the run in a folder: from ``run.json``, or from ``settings.toml`` where that is damaged.

    Raises
    ------
    ValueError
        Neither can be read.
    """
    description = RunDescription.read(folder.description)
    try:
        values = description.settings if description else read_toml(folder.settings)
        return make_settings(values).model_copy(update={"out": folder.path})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the settings of {folder.path} cannot be read ({error}). Give the 'stillframe run' command that began it "
            "once more: it keeps what is valid and does the rest again."
        ) from error


def _refuse_other_version(path: Path, content: bytes) -> None:
    """Raise ``OtherVersion`` if what cannot be read here is whole and says that another version wrote it."""
    try:
        # Another version may have no checksum, or another kind.
        version = json.loads(without_checksum(content) if has_checksum(content) else content)["version"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return
    if isinstance(version, int) and version != RUN_VERSION:
        raise OtherVersion(
            f"{path} has version {version}, and this stillframe reads version {RUN_VERSION}: another one wrote it. Use "
            "that one, or another folder; nothing was changed."
        )
