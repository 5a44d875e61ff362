"""What to ask a batch system for: the file given as --cluster, or the name of a system."""

import re
from pathlib import Path
from typing import Literal, get_args

import pydantic
from pydantic import Field

from stillframe.settings import Settings, in_words, read_toml

System = Literal["slurm", "pbs", "lsf", "sge"]
SYSTEMS: tuple[System, ...] = get_args(System)
"""Batch systems that are known."""

_WALLTIME = r"^(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)$"
_MARGIN, _LONGEST_MARGIN = 0.1, 600.0
"""How long before its walltime a worker leaves: a tenth of it, or this many seconds."""


class Jobs(pydantic.BaseModel):
    """What to ask a batch system for; every field but the system has a default that works at many centres.

    Examples
    --------
    >>> Jobs(system="slurm", walltime="04:00:00").leaves_after
    (13800.0, 300.0)
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    """Version of this format."""
    system: System
    """Batch system."""
    jobs: int = Field(default=4, ge=1)
    """Jobs, of one worker process with one thread each; --workers goes before it."""
    memory: float = Field(default=4.0, gt=0)
    """Memory of a job, GiB; --memory goes before it."""
    walltime: str = Field(default="01:00:00", pattern=_WALLTIME)
    """Time of a job, HH:MM:SS or D-HH:MM:SS."""
    lifetime: float | None = Field(default=None, gt=0)
    """Seconds after which a worker leaves; by default a tenth, or ten minutes, before its walltime."""
    queue: str | None = None
    """Partition or queue."""
    account: str | None = None
    """Account or project to be charged."""
    interface: str | None = None
    """Network interface of the nodes, such as ib0."""
    driver_interface: str | None = None
    """That of the machine where the command runs, if it has another name there."""
    scratch: str = "${TMPDIR:-/tmp}"
    """Folder of each node for dask's own files; a shell expands it there."""
    log: Path | None = None
    """Folder of the jobs' logs; ``jobs`` in the run's folder by default."""
    directives: list[str] = []
    """Further lines for the head of the job script, such as "--constraint=rome"."""
    prologue: list[str] = []
    """Commands before the worker starts, such as "module load gcc"."""
    python: str | None = None
    """The Python of the jobs; the one that runs this by default."""

    @property
    def seconds(self) -> int:
        """Walltime."""
        days, hours, minutes, seconds = self._walltime
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def _walltime(self) -> tuple[int, ...]:
        found = re.match(_WALLTIME, self.walltime)
        assert found
        return tuple(int(part or 0) for part in found.groups())

    @property
    def leaves_after(self) -> tuple[float, float]:
        """Seconds after which workers leave, and by how much that differs from one to the next at most."""
        margin = min(_MARGIN * self.seconds, _LONGEST_MARGIN)
        lifetime = self.lifetime or self.seconds - margin
        return lifetime, min(margin / 2, 0.1 * lifetime) if self.lifetime else margin / 2

    @property
    def time(self) -> str:
        """Walltime as the batch system reads it."""
        days, hours, minutes, seconds = self._walltime
        hours += 24 * days
        return f"{hours}:{minutes:02}" if self.system == "lsf" else f"{hours:02}:{minutes:02}:{seconds:02}"


def is_system(name: str) -> bool:
    """Tell whether a word is the name of a batch system."""
    return name in SYSTEMS


def read_jobs(cluster: str) -> Jobs:
    """Return what a name, or a TOML file, asks for.

    Raises
    ------
    ValueError
        Tells every mistake in the file.
    FileNotFoundError
        Neither a known name nor a file.
    """
    if is_system(cluster):
        return Jobs(system=cluster)  # type: ignore[arg-type]
    path = Path(cluster)
    if not path.is_file():
        raise FileNotFoundError(
            f"--cluster {cluster} is neither local, {', '.join(SYSTEMS)} nor a file. Begin with a copy of "
            "cluster/slurm.toml."
        )
    try:
        return Jobs(**read_toml(path))
    except pydantic.ValidationError as error:
        raise ValueError(in_words(f"{path} cannot be used:", error, "Correct it there.")) from None


def with_settings(jobs: Jobs, settings: Settings, log: Path) -> Jobs:
    """Let what was said for this run go before what is said for all."""
    said = {"jobs": settings.workers, "memory": settings.memory}
    given = {name: value for name, value in said.items() if value}
    return jobs.model_copy(update=given | {"log": jobs.log or log})
