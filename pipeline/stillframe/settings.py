"""Settings of a run: one validated model, made from command-line flags, a TOML file or Python.

The docstring of each field is also the help text of its flag.
"""

import tomllib
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import tomli_w
from pydantic import Field

from stillframe.options import InputCheck, Interpolation, MissingChunks, SearchOptions
from stillframe.versions import SETTINGS_VERSION
from stillframe.wording import in_words


class Settings(SearchOptions):
    """Settings of a run; every field but ``frames`` and ``out`` has a default that suits most data.

    Examples
    --------
    >>> Settings(frames="frames.zarr", out="run", max_shift=16).interpolation
    'nearest'
    """

    version: Literal[1] = SETTINGS_VERSION
    """Version of the format of settings."""
    frames: Path
    """Zarr array (frame, y, x), or a Zarr group that holds one; only read."""
    out: Path
    """Folder of the run; created if it does not exist."""
    mask: Path | None = None
    """Valid pixels (y, x), non-zero = valid: npy, tif, png or Zarr. By default every pixel is valid."""
    dark: Path | None = None
    """Image of the detector without beam (y, x), subtracted from every frame before it is compared: npy, tif, png or
    Zarr. Aligned frames keep the recorded counts. By default that of a reference.zarr, else none."""
    flat: Path | None = None
    """Response of the pixels to equal illumination (y, x), less its dark, in any unit; every frame is divided by it
    before it is compared: npy, tif, png or Zarr. By default that of a reference.zarr, else none."""
    reference: str | None = None
    """Frames to average ("0:16", "100"), or the path of a reference.zarr or of an image (with dark or flat: corrected
    already). By default 16 usable frames that are spread over the stack."""
    reference_iterations: int = Field(default=3, ge=0)
    """Largest number of rounds in which the frames of the reference are registered and averaged. With 0 their plain
    mean is taken, by default of 16 neighbours in the middle of the stack."""
    detector_map: bool = True
    """Find out from the drift of these frames which pixels do not follow the pattern, and leave these out; correct
    gains and offsets of the others where that matters."""
    reference_kind: str | None = None
    """Average only frames whose coordinate kind has this value, such as "unpumped"."""
    interpolation: Interpolation = "nearest"
    """How frames are moved: nearest (by whole pixels, keeps dtype and counts), linear, cubic or lanczos."""
    fill: float | None = None
    """Value of pixels for which nothing was observed. By default NaN for floats and 0 for integers."""
    missing_chunks: MissingChunks = "report"
    """Meaning of an input chunk without a file: report (its frames are flagged corrupt), or fill (the fill value)."""
    input_check: InputCheck = "times"
    """How changed input files are noticed: times (names, sizes and modification times), or contents (checksums, for
    which all files are read once more)."""
    align: bool = True
    """Align the frames after registering them."""
    unit_frames: int | None = Field(default=None, ge=1)
    """Frames of a unit, which one task reads and one shard of the output holds. By default chosen from memory and
    input chunks."""
    workers: int | None = Field(default=None, ge=0)
    """Worker processes; 0 works in this process. By default one per core, or the number in the cluster's file."""
    memory: float | None = Field(default=None, gt=0)
    """Memory per worker, GiB. By default that of the machine or of the cluster's file."""
    cluster: str | None = None
    """Where workers are started: local, a batch system (slurm, pbs, lsf, sge), or a TOML file that describes jobs."""
    scheduler: str | None = None
    """Address or scheduler file of a running dask cluster, used instead of starting workers."""
    certificates: Path | None = None
    """Folder with ca.pem, cert.pem and key.pem for that scheduler. By default those of dask's configuration."""

    @pydantic.field_validator("reference", "scheduler", "cluster")
    @classmethod
    def _absolute_if_file(cls, value: str | None, field: pydantic.ValidationInfo) -> str | None:
        """Make the path of a file absolute, since settings are read again from other folders.

        Only a reference may be a folder: a folder may have the name of a batch system.
        """
        path = Path(value or "").expanduser()
        exists = path.exists() if field.field_name == "reference" else path.is_file()
        return str(path.absolute()) if value and exists else value

    @pydantic.field_validator("frames", "out", "mask", "dark", "flat", "certificates")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        """Make a path absolute, since workers may run in other folders."""
        return None if path is None else path.expanduser().absolute()

    @pydantic.model_validator(mode="after")
    def _one_cluster(self) -> Self:
        if self.cluster and self.scheduler:
            raise ValueError("a cluster is to be started and a scheduler to be connected to: give one of them")
        return self

    @property
    def search(self) -> SearchOptions:
        """The search options alone, which references hold."""
        return SearchOptions(**{name: getattr(self, name) for name in SearchOptions.model_fields})

    def to_toml(self) -> str:
        """Return the settings as TOML; those that are None are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file, without validating them."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not TOML: {error}. Correct that line, or start from a run's settings.toml."
        ) from error


def make_settings(values: dict[str, Any]) -> Settings:
    """Return validated settings; raise ``ValueError`` with all that are missing, unknown or not allowed.

    Examples
    --------
    >>> make_settings({"frames": "a.zarr", "out": "run", "max_shift": -1})
    Traceback (most recent call last):
    ...
    ValueError: the settings cannot be used:
      max_shift = -1: input should be greater than or equal to 0
    Correct them in the flags or in the settings file.
    """
    try:
        return Settings(**values)
    except pydantic.ValidationError as error:
        advice = "Correct them in the flags or in the settings file."
        raise ValueError(in_words("the settings cannot be used:", error, advice)) from None
