"""What tests ask of a real Slurm."""

import json
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from faulty import Started, run_command

CLUSTER = Path(__file__).parents[1] / "cluster"
UNITS = 320
"""Of the stack that tests run, a frame each."""


@dataclass(frozen=True)
class Slurm:
    """What tests ask of Slurm."""

    environment: dict[str, str]
    folder: Path

    def ask(self, *command):
        """Run one of Slurm's commands and return what it says."""
        told = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True)
        return told.stdout.strip()

    def jobs(self, name="stillframe", state="R"):
        """Numbers of jobs of a name and state."""
        return self.ask("squeue", "-h", "-o", "%A", "-n", name, "-t", state).split()

    def settings(self, **given):
        """A file of jobs, from the one that users copy."""
        some = {"jobs": 2, "memory": 1.5, "walltime": "00:10:00", "interface": "lo"} | given
        known = (line.split("#")[0].strip() for line in (CLUSTER / "slurm.toml").read_text().splitlines())
        kept = [line for line in known if line and line.split(" ")[0] not in some]
        file = self.folder / "slurm.toml"
        file.write_text("\n".join([*kept, *(f"{name} = {_toml(value)}" for name, value in some.items())]))
        return file

    def start(self, frames, mask, out, *more, **given):
        """Start a run whose workers are jobs."""
        options = {"unit_frames": 1, "reference": "0:16"}
        command = run_command((frames, mask), out, "--cluster", self.settings(**given), *more, **options)
        return Started(command, env=self.environment)

    def submit(self, *command):
        """Submit a job and return its number."""
        return self.ask("sbatch", "--parsable", f"--chdir={self.folder}", *map(str, command))


def _toml(value):
    return value if isinstance(value, int | float) else json.dumps(value)


def units_done(out):
    """Count the units that are finished."""
    return len(list((out / "units" / "align").glob("0*.json")))


class Growing:
    """A copy of a stack that an experiment seems to write: a file now and then, and the rest when it is told to end."""

    def __init__(self, stored, folder, pause=2.0):
        frames, self.mask = stored
        self.frames = folder / "frames.zarr"
        shards = frames / "frames" / "c"
        shutil.copytree(frames, self.frames, ignore=lambda home, _: os.listdir(home) if Path(home) == shards else [])
        self._left = sorted(shards.iterdir(), key=lambda path: int(path.name))
        self._end = threading.Event()
        self._writer = threading.Thread(target=self._write, args=(pause,))

    def __enter__(self):
        self._writer.start()
        return self

    def __exit__(self, *_):
        self.end()

    def _write(self, pause):
        for number, shard in enumerate(self._left):
            last = number + 2 >= len(self._left)
            self._end.wait(None if last else 0 if number < _AT_ONCE else pause)
            shutil.copytree(shard, self.frames / "frames" / "c" / shard.name)
        array = self.frames / "frames" / "zarr.json"
        metadata = json.loads(array.read_text())
        metadata["attributes"]["complete"] = True
        partial = array.with_name("partial")
        partial.write_text(json.dumps(metadata))
        partial.replace(array)

    def end(self):
        """Let what is left come at once."""
        self._end.set()
        self._writer.join()


_AT_ONCE = 4
"""Files that are there from the start, or nearly so."""
