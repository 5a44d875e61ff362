"""Settings of the jobs that a batch system runs: the file given as --cluster, or the defaults of a system."""

import re
from pathlib import Path
from typing import Literal, get_args

import pydantic
from pydantic import Field

from stillframe.settings import Settings, read_toml
from stillframe.wording import in_words

System = Literal["slurm", "pbs", "lsf", "sge"]
SYSTEMS: tuple[System, ...] = get_args(System)
"""Names of the supported batch systems."""

_WALLTIME = r"^(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)$"
_MARGIN, _LONGEST_MARGIN = 0.1, 600.0
"""Time by which a worker leaves before the end of its walltime: this fraction of it, at most so many seconds."""


class JobSettings(pydantic.BaseModel):
    """Settings of jobs; every field but the system has a default that works at many computing centres.

    Examples
    --------
    >>> JobSettings(system="slurm", walltime="04:00:00").leaves_after
    (13800.0, 300.0)
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    """Version of this format."""
    system: System
    """Batch system."""
    jobs: int = Field(default=4, ge=1)
    """Number of jobs, each one worker process with one thread; --workers overrides it."""
    memory: float = Field(default=4.0, gt=0)
    """Memory of a job, GiB; --memory overrides it."""
    walltime: str = Field(default="01:00:00", pattern=_WALLTIME)
    """Time limit of a job, HH:MM:SS or D-HH:MM:SS."""
    lifetime: float | None = Field(default=None, gt=0)
    """Seconds after which a worker leaves; by default a tenth, or ten minutes, before its walltime."""
    queue: str | None = None
    """Partition or queue."""
    account: str | None = None
    """Account or project to be charged."""
    interface: str | None = None
    """Network interface of the nodes, such as ib0."""
    driver_interface: str | None = None
    """Network interface of the machine where the command runs, if it has another name there."""
    scratch: str = "${TMPDIR:-/tmp}"
    """Folder on each node for dask's temporary files; the shell of the job expands it."""
    log: Path | None = None
    """Folder for the output of the jobs; ``jobs`` in the run's folder by default."""
    directives: list[str] = []
    """Further lines for the head of the job script, such as "--constraint=rome"."""
    prologue: list[str] = []
    """Commands before the worker starts, such as "module load gcc"."""
    python: str | None = None
    """Python interpreter of the jobs; the one that runs the command by default."""

    @property
    def seconds(self) -> int:
        """Walltime in seconds."""
        match = re.match(_WALLTIME, self.walltime)
        assert match
        days, hours, minutes, seconds = (int(digits or 0) for digits in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def leaves_after(self) -> tuple[float, float]:
        """Seconds after which workers leave, and the largest random deviation, so that not all leave at once."""
        margin = min(_MARGIN * self.seconds, _LONGEST_MARGIN)
        lifetime = self.lifetime or self.seconds - margin
        return lifetime, min(margin / 2, 0.1 * lifetime) if self.lifetime else margin / 2

    @property
    def time(self) -> str:
        """Walltime in the format of the batch system."""
        minutes, seconds = divmod(self.seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}" if self.system == "lsf" else f"{hours:02}:{minutes:02}:{seconds:02}"


def read_job_settings(cluster: str) -> JobSettings:
    """Read the settings from a TOML file, or return the defaults if given the name of a batch system."""
    if cluster in SYSTEMS:
        return JobSettings(system=cluster)
    path = Path(cluster)
    if not path.is_file():
        raise FileNotFoundError(
            f"--cluster {cluster} is neither local, {', '.join(SYSTEMS)} nor a file. Begin with a copy of "
            "cluster/slurm.toml."
        )
    try:
        return JobSettings(**read_toml(path))
    except pydantic.ValidationError as error:
        raise ValueError(in_words(f"{path} cannot be used:", error, "Correct it there.")) from None


def with_run_settings(asked: JobSettings, settings: Settings, log: Path) -> JobSettings:
    """Return job settings in which the options of one run (--workers, --memory) override those of the file."""
    options = {"jobs": settings.workers, "memory": settings.memory}
    given = {name: value for name, value in options.items() if value}
    return asked.model_copy(update=given | {"log": asked.log or log})
