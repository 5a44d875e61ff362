"""What a run's folder says of itself: how the stack is cut and with which settings, and how its finished files looked.

Both files end with their own checksum. A damaged plan is made again, from the settings and from what records say.
"""

from pathlib import Path
from typing import Any, Final, Literal

import pydantic

from stillframe.durable import Seal, with_checksum, write_durably
from stillframe.records import Ledger, read_sealed
from stillframe.units import Plan

PLAN_VERSION: Final = 2
SEALS_VERSION: Final = 1


class StoredPlan(pydantic.BaseModel):
    """How a run cuts its stack into units, and its settings."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: Literal[1, 2] = PLAN_VERSION
    """Version of this format; 1 had neither settings nor a checksum."""
    frames: int = pydantic.Field(ge=1)
    """Frames of the stack."""
    unit_frames: int = pydantic.Field(ge=1)
    """Frames of a unit."""
    settings: dict[str, Any] = {}
    """Those of the last run, as in settings.toml."""

    parts: int = 0
    """Parts that independent processes do, where it was run so."""

    @property
    def plan(self) -> Plan:
        """The units."""
        return Plan(self.frames, self.unit_frames)


def write_plan(folder: Path, plan: Plan, settings: dict[str, Any], parts: int = 0) -> None:
    """Keep how the stack is cut into units, for a later look and for a later run."""
    stored = StoredPlan(frames=plan.frames, unit_frames=plan.unit_frames, settings=settings, parts=parts)
    write_durably(folder / "plan.json", with_checksum(stored.model_dump_json().encode()))


def read_stored_plan(folder: Path) -> StoredPlan | None:
    """Return what :func:`write_plan` kept; None where no run has begun, or where it is damaged.

    Raises
    ------
    ValueError
        It was written by a newer version of this package.
    """
    return read_sealed(folder / "plan.json", StoredPlan, PLAN_VERSION, unsealed=1)


def read_plan(folder: Path) -> Plan | None:
    """Return how a run cut its stack, from the records where the plan is damaged; None where no run has begun."""
    stored = read_stored_plan(folder)
    return stored.plan if stored else _plan_of_records(folder)


def aligns(folder: Path) -> bool:
    """Tell whether a run aligns frames, too, or only registers them."""
    stored = read_stored_plan(folder)
    return stored is None or stored.settings.get("align", True) is not False


def _plan_of_records(folder: Path) -> Plan | None:
    """Put a plan together from what records say; their last frame is the least there are."""
    records = Ledger(folder).records("register")
    if not records:
        return None
    return Plan(max(record.stop for record in records), max(record.stop - record.start for record in records))


class Seals(pydantic.BaseModel):
    """How the files of a finished run looked, but for shards and records, which are sealed on their own."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = SEALS_VERSION
    """Version of this format."""
    files: dict[str, Seal]
    """By name within the run's folder."""

    @classmethod
    def of(cls, folder: Path, files: list[Path]) -> "Seals":
        """Seal files as they are now."""
        return cls(files={str(file.relative_to(folder)): Seal.of(file) for file in files})

    def write(self, folder: Path) -> None:
        """Keep them, durably."""
        write_durably(folder / "seals.json", with_checksum(self.model_dump_json().encode()))


def read_seals(folder: Path) -> Seals | None:
    """Return what :meth:`Seals.write` kept, None where no run finished or they are damaged.

    Raises
    ------
    ValueError
        They were written by a newer version of this package.
    """
    return read_sealed(folder / "seals.json", Seals, SEALS_VERSION)


def is_sealed(folder: Path, store: Path) -> bool:
    """Tell whether every file of a store in a run's folder is as it was sealed, with none missing and none more."""
    seals = read_seals(folder)
    if seals is None:
        return False
    known = {name: seal for name, seal in seals.files.items() if store in (folder / name).parents}
    there = {str(file.relative_to(folder)) for file in store.rglob("*") if file.is_file()}
    return there == known.keys() and all(Seal.of(folder / name) == seal for name, seal in known.items())
