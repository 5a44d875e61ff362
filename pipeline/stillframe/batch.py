"""The resumable run: a pass over the stack, going on where the last run ended, or more while the stack grows."""

import contextlib
import errno
import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillframe.clusters import executor
from stillframe.doors import warn_of_open_folder
from stillframe.durable import make_folder
from stillframe.errors import RunStopped, hopeless
from stillframe.executors import Executor, unit_budget
from stillframe.follow import growing
from stillframe.frames import FrameSource
from stillframe.leases import Lease, lease
from stillframe.origin import Origin
from stillframe.passes import Pass, Result
from stillframe.prepare import check_folder, open_source_of, prepare_plan, prepare_reference
from stillframe.progress import log_name, log_to
from stillframe.reference import Reference
from stillframe.resample import check_fill, output_dtype
from stillframe.settings import Settings
from stillframe.units import Plan, Share


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
    >>> from stillframe.scene import Experiment
    >>> from stillframe.simulate import simulate
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
        first = next(sources)
        reference, origin = prepare_reference(settings, first)
        check_fill(settings.fill, output_dtype(first.dtype, settings.interpolation))
        # The lease before the workers: a batch system may let them wait for hours.
        with driving(settings.out) as held, executor(settings, client, stop) as workers:
            rounds = _rounds(settings, itertools.chain([first], sources), unit_budget(workers))
            source, plan = next(rounds)
            result = Pass(source, plan, settings, reference, origin, workers, held).all_stages()
            for source, plan in rounds:
                reference, origin = prepare_reference(settings, source)
                result = Pass(source, plan, settings, reference, origin, workers, held).all_stages()
        return result


@contextlib.contextmanager
def driving(folder: Path, share: Share | None = None) -> Iterator[Lease]:
    """Be the one who writes into a folder, or does a part of it, and keep a log there.

    A new folder in which nothing was begun is removed again.
    """
    new = not folder.exists()
    make_folder(folder)
    try:
        with lease(folder, share) as held, log_to(folder / log_name(share)):
            warn_of_open_folder(folder)
            yield held
    finally:
        if new and not (folder / "settings.toml").exists():
            _remove_if_empty(folder, share)


def _remove_if_empty(folder: Path, share: Share | None) -> None:
    """Remove a folder that holds nothing but what whoever drives it needs himself."""
    own = {log_name(share), ".lease.lock", ".lease.gate"}
    with contextlib.suppress(OSError):
        if {file.name for file in folder.iterdir()} <= own:
            for name in own:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def run_once(
    source: FrameSource,
    plan: Plan,
    settings: Settings,
    reference: Reference,
    origin: Origin | None,
    workers: Executor,
) -> Result:
    """Go over what there is of a stack once, with everything prepared."""
    with driving(settings.out) as held:
        return Pass(source, plan, settings, reference, origin, workers, held).all_stages()


def _rounds(settings: Settings, sources: Iterator[FrameSource], budget: int) -> Iterator[tuple[FrameSource, Plan]]:
    """Yield the stack with its units, whenever there are new ones."""
    done = 0
    for source in sources:
        plan = prepare_plan(settings, source, budget)
        if source.limit is None:
            yield source, plan
        elif plan.frames > done:
            done = plan.frames
            yield replace(source, limit=done), plan


@contextlib.contextmanager
def stopped_in_words(out: Path) -> Iterator[None]:
    """Say what every further step would meet too, and what to do about it."""
    try:
        yield
    except OSError as error:
        if not hopeless(error) and error.errno != errno.EIO:
            raise
        raise RunStopped(
            f"{error.strerror} ({error.filename or out}). Nothing further can be done; what is finished is kept. "
            "Make room, give permission or bring it back there, then run the same command again."
        ) from error
