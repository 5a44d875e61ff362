"""What a run is told: one validated model, from flags, a TOML file or Python."""

import tomllib
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import tomli_w
from pydantic import Field

from stillframe.resample import Interpolation
from stillframe.template import Weights

SETTINGS_VERSION = 1


class Settings(pydantic.BaseModel):
    """Settings of a run; every field but three has a default that suits most data.

    Examples
    --------
    >>> Settings(frames="frames.zarr", out="run", max_shift=16).interpolation
    'nearest'
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    """Version of this format."""
    frames: Path
    """Zarr array (frame, y, x), or a Zarr group with one; read only."""
    out: Path
    """Folder of the run; made where it is missing."""
    mask: Path | None = None
    """Valid pixels (y, x), non-zero = valid: npy, tif, png or Zarr. Without one every pixel is valid."""
    reference: str | None = None
    """Frames to average ("0:16", "100"), or the path of an image or of a reference.zarr; by default the first 16
    frames, or as many as there are."""
    reference_iterations: int = Field(default=3, ge=0)
    """How often, at most, those frames are registered and averaged where the reference is."""
    reference_kind: str | None = None
    """Average only frames whose coordinate kind says this, such as "unpumped"."""
    max_shift: int = Field(default=32, ge=0)
    """Largest shift looked for along either axis, pixels."""
    overlap_ratio: float = Field(default=0.3, ge=0, le=1)
    """Least overlap at a shift, as a part of the largest."""
    saturation: float | None = None
    """Pixel value at which the detector saturates; the limit of an integer dtype by default."""
    subpixel: bool = True
    """Whether shifts are refined to fractions of a pixel, with their errors."""
    weights: Weights = "counts"
    """What pixels weigh in the refinement: the inverse variance of counts, or uniform."""
    interpolation: Interpolation = "nearest"
    """How frames are moved: nearest (whole pixels, dtype and counts kept), linear, cubic or lanczos."""
    fill: float | None = None
    """Value of pixels nothing was observed for: NaN for floats, 0 for integers by default."""
    missing_chunks: Literal["report", "fill"] = "report"
    """An input chunk without a file is reported and its frames flagged, or read as the input's fill value."""
    input_check: Literal["times", "contents"] = "times"
    """How a change of input files is noticed: by names, sizes and times, or by checksums of all they hold, which takes
    another reading of them."""
    unit_frames: int | None = Field(default=None, ge=1)
    """Frames of a unit, that is of an output shard; chosen from memory and input chunks by default."""
    workers: int | None = Field(default=None, ge=0)
    """Worker processes; one per core or as many as the cluster's file says by default, 0 to work in this process."""
    scheduler: str | None = None
    """Address or scheduler file of a running dask cluster, instead of local workers."""
    certificates: Path | None = None
    """Folder with ca.pem, cert.pem and key.pem to connect to that scheduler with; else as dask is configured."""
    cluster: str | None = None
    """Where workers are started: local, a batch system (slurm, pbs, lsf, sge), or a TOML file that tells its jobs."""
    memory: float | None = Field(default=None, gt=0)
    """Memory per worker, GiB; from the machine or the cluster by default."""

    align: bool = True
    """Whether frames are aligned, or only registered."""

    @pydantic.field_validator("scheduler", "cluster")
    @classmethod
    def _absolute_if_plain_file(cls, value: str | None) -> str | None:
        """A folder may have the name of a batch system."""
        known = value is not None and Path(value).expanduser().is_file()
        return str(Path(str(value)).expanduser().absolute()) if known else value

    @pydantic.field_validator("reference")
    @classmethod
    def _absolute_if_file(cls, value: str | None) -> str | None:
        """Settings are read again from other folders."""
        known = value is not None and Path(value).expanduser().exists()
        return str(Path(str(value)).expanduser().absolute()) if known else value

    @pydantic.field_validator("frames", "out", "mask", "certificates")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        """Workers may run in other folders."""
        return None if path is None else path.expanduser().absolute()

    @pydantic.model_validator(mode="after")
    def _one_cluster(self) -> Self:
        if self.cluster and self.scheduler:
            raise ValueError("a cluster is to be started and a scheduler to be connected to: give one of them")
        return self

    def to_toml(self) -> str:
        """Return the settings as TOML; what is not set is left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file, unchecked.

    Raises
    ------
    ValueError
        Not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not TOML: {error}. Correct that line, or start from a run's settings.toml."
        ) from error


def make_settings(values: dict[str, Any]) -> Settings:
    """Validate settings and tell every mistake in one message.

    Raises
    ------
    ValueError
        Names each field, what was given and what is allowed.

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


def in_words(head: str, error: pydantic.ValidationError, advice: str) -> str:
    """Return every mistake that was found, a line each."""
    return "\n".join((head, *(f"  {_say(problem)}" for problem in error.errors()), advice))


def _say(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name}: {message}" if problem["type"] == "missing" else f"{name} = {problem['input']!r}: {message}"
