"""The resumable run: one pass over the stack, going on where the last run ended, or more while the stack grows."""

import contextlib
import errno
import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillframe.cluster.connect import executor
from stillframe.cluster.executors import unit_budget
from stillframe.cluster.security import warn_of_open_folder
from stillframe.errors import RunStopped, hopeless
from stillframe.log import log_to
from stillframe.partition import Plan, Share
from stillframe.settings import Settings
from stillframe.storage.durable import make_folder
from stillframe.storage.frames import FrameSource
from stillframe.workflow.begin import begin, check_folder, cut, open_source_of
from stillframe.workflow.follow import growing
from stillframe.workflow.lease import Lease, lease
from stillframe.workflow.run_folder import RunFolder
from stillframe.workflow.stages import Pass, Result


def run(settings: Settings, client: Any = None, *, follow: bool = False, stop: threading.Event | None = None) -> Result:
    """Register and align a stack of frames, going on where an earlier run with the same folder ended.

    Parameters
    ----------
    settings : Settings
        What to do; see :class:`~stillframe.Settings`.
    client : distributed.Client, optional
        A cluster to use; by default what the settings say, else worker processes on this machine.
        In a script, call this under ``if __name__ == "__main__":``, as for every program that starts processes.
    follow : bool
        Whether frames are still being written: units are taken as they become complete, until the attribute
        ``complete`` of the frames' array, or of its group, is true.
    stop : threading.Event, optional
        Set from elsewhere, it ends the run as Ctrl-C does.

    Returns
    -------
    Result
        Where the results are, and what went wrong: ``problems`` is empty for a complete run.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        Input or settings that cannot be used; nothing was changed.
    LeaseError
        Another run works on this folder.
    RunStopped
        No space, no permission, no input any more…: the run cannot go on now. Run it again; what is finished is kept.
    KeyboardInterrupt
        Ctrl-C, or ``stop`` was set.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from stillframe.simulation.experiment import Experiment
    >>> from stillframe.simulation.write import simulate
    >>> folder = Path(tempfile.mkdtemp())
    >>> frames, mask = simulate(Experiment(frames=4, shape=(64, 64)), folder)
    >>> result = run(Settings(frames=frames, mask=mask, out=folder / "run", reference="0", max_shift=12, workers=0))
    >>> result.frames, result.problems
    (4, [])
    """
    stop = stop or threading.Event()
    with stopped_in_words(settings.out):
        check_folder(settings)
        sources = growing(settings, stop) if follow else iter([open_source_of(settings)])
        source = next(sources)
        inputs = begin(settings, source)
        # The lease before the workers: a batch system may let them wait for hours.
        with driving(inputs.folder) as held, executor(settings, client, stop) as workers:
            rounds = _rounds(settings, itertools.chain([source], sources), unit_budget(workers))
            source, plan = next(rounds)
            result = Pass(replace(inputs, source=source), plan, workers, held).run()
            for source, plan in rounds:
                result = Pass(begin(settings, source), plan, workers, held).run()
        return result


@contextlib.contextmanager
def driving(folder: RunFolder, share: Share | None = None) -> Iterator[Lease]:
    """Hold the lease of a folder, or of a part of it, and append to the log there.

    A new folder in which nothing was begun is removed again.
    """
    new = not folder.path.exists()
    make_folder(folder.path)
    try:
        with lease(folder, share) as held, log_to(folder.log(share)):
            warn_of_open_folder(folder.path)
            yield held
    finally:
        if new and not folder.has_begun:
            _remove_if_empty(folder, share)


def _remove_if_empty(folder: RunFolder, share: Share | None) -> None:
    """Remove a folder that holds nothing but the driver's own log and locks."""
    own = (folder.log(share), folder.lease_lock, folder.lease_gate)
    with contextlib.suppress(OSError):
        if {*folder.path.iterdir()} <= {*own}:
            for path in own:
                path.unlink(missing_ok=True)
            folder.path.rmdir()


def _rounds(settings: Settings, sources: Iterator[FrameSource], budget: int) -> Iterator[tuple[FrameSource, Plan]]:
    """Yield the stack with its units, whenever there are new ones."""
    done = 0
    for source in sources:
        plan = cut(settings, source, budget)
        if source.limit is None:
            yield source, plan
        elif plan.frames > done:
            done = plan.frames
            yield replace(source, limit=done), plan


@contextlib.contextmanager
def stopped_in_words(out: Path) -> Iterator[None]:
    """Turn an error that would hit every further step into words on what to do."""
    try:
        yield
    except OSError as error:
        if not hopeless(error) and error.errno != errno.EIO:
            raise
        raise RunStopped(
            f"{error.strerror} ({error.filename or out}). Nothing further can be done; what is finished is kept. "
            "Make room, give permission or bring it back there, then run the same command again."
        ) from error
