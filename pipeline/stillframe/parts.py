"""A run in parts, without a scheduler: independent processes on one output, and a last one that gathers.

The first part that starts prepares the folder while the others wait; each then does its own units, under a lease of its
own. They agree through the folder alone, so that a batch system may start them whenever and wherever it likes.
"""

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from stillframe.batch import driving, stopped_in_words
from stillframe.clusters import executor
from stillframe.durable import make_folder
from stillframe.errors import RunStopped
from stillframe.executors import Executor, InProcess, unit_budget
from stillframe.leases import HEARTBEAT, SKEW, STALE, Holder, Lease, one_at_a_time, read_leases
from stillframe.passes import Pass, Result
from stillframe.plans import read_stored_plan
from stillframe.prepare import check_folder, open_source_of, prepare_plan, prepare_reference
from stillframe.progress import log
from stillframe.resample import check_fill, output_dtype
from stillframe.settings import Settings
from stillframe.store import load_reference
from stillframe.units import Plan, Share, Unit, first_few
from stillframe.verify import known_settings

_WITHOUT_EFFECT = {"workers", "memory", "scheduler", "certificates", "cluster"}
"""Settings that change no result."""
_LOOK_EVERY = 1.0
"""Seconds between two looks whether a part is still at work."""


@dataclass(frozen=True)
class PartResult:
    """What one part of a run did."""

    folder: Path
    """The run's folder."""
    share: Share
    """Which part."""
    frames: int
    """Its frames."""
    problems: list[str]
    """What could not be read or done."""


def run_part(settings: Settings, share: Share, *, stop: threading.Event | None = None) -> PartResult:
    """Register and align one part of a stack, beside other processes that do the others.

    Parameters
    ----------
    settings : Settings
        The same for all parts, but for workers and memory; by default the work is done in this process.
    share : Share
        Which part.
    stop : threading.Event, optional
        Set from elsewhere, it ends this as Ctrl-C does.

    Raises
    ------
    LeaseError
        Another process does the same part, or drives the run as a whole.
    ValueError
        Other parts are at work with other settings or frames, or what :func:`stillframe.run` would refuse.
    RunStopped
        As for :func:`stillframe.run`.
    """
    stop = stop or threading.Event()
    with stopped_in_words(settings.out):
        check_folder(settings, Holder.me(share))
        with executor(_alone(settings), None, stop) as workers, _begun(settings, share, workers, stop) as part:
            problems = part.work()
            frames = sum(unit.stop - unit.start for unit in share.units(part.plan.units))
            log.info("part %s is finished: %d frames, %d problems", share, frames, len(problems))
            shutil.rmtree(part.held.drafts, ignore_errors=True)
            return PartResult(settings.out, share, frames, problems)


def _alone(settings: Settings) -> Settings:
    """Work in this process, unless something else is asked for."""
    asked = settings.workers is not None or settings.cluster or settings.scheduler
    return settings if asked else settings.model_copy(update={"workers": 0})


@contextlib.contextmanager
def _begun(settings: Settings, share: Share, workers: Executor, stop: threading.Event) -> Iterator[Pass]:
    """Prepare the folder, or see that who did so before meant the same; then let the others go on."""
    make_folder(settings.out)
    with contextlib.ExitStack() as stack:
        with one_at_a_time(settings.out, stop) as now:
            check_folder(settings, Holder.me(share))
            others = read_leases(settings.out, now)
            if others:
                _refuse_other_settings(settings, others)
            source = open_source_of(settings)
            reference, origin = prepare_reference(settings, source)
            check_fill(settings.fill, output_dtype(source.dtype, settings.interpolation))
            plan = prepare_plan(settings, source, unit_budget(workers))
            if others:
                _refuse_other_frames(settings.out, plan, reference.digest)
            held: Lease = stack.enter_context(driving(settings.out, share))
            part = Pass(source, plan, settings, reference, origin, workers, held, share)
            held.drafts.mkdir(parents=True, exist_ok=True) if others else part.begin()
        yield part


def _refuse_other_settings(settings: Settings, others: list[Holder]) -> None:
    stored = read_stored_plan(settings.out)
    before, now = stored.settings if stored else {}, settings.model_dump(mode="json", exclude_none=True)
    other = [name for name in before | now if name not in _WITHOUT_EFFECT and before.get(name) != now.get(name)]
    if other:
        raise ValueError(
            f"{others[0]} works on {settings.out} with other settings: {', '.join(other)}. All parts of a run must be "
            "given the same; wait for them, or stop them."
        )


def _refuse_other_frames(out: Path, plan: Plan, digest: str) -> None:
    stored = read_stored_plan(out)
    if stored is None or stored.plan != replace(plan, decodes=1):
        raise ValueError(
            f"other parts of {out} began with {stored.frames if stored else 'an unknown number of'} frames, and there "
            f"are {plan.frames} now. Start parts when no frame is added any more; wait for the others, or stop them."
        )
    if load_reference(out / "reference.zarr").digest != digest:
        raise ValueError(
            f"the reference of {out} changed since other parts began with it. Wait for them, or stop them, and start "
            "all parts again."
        )


def gather(folder: Path, *, stop: threading.Event | None = None) -> Result:
    """Put together what the parts of a run found; nothing is registered or aligned here.

    Parameters
    ----------
    folder : Path
        Of the run.
    stop : threading.Event, optional
        Set from elsewhere, it ends this as Ctrl-C does.

    Returns
    -------
    Result
        As of :func:`stillframe.run`.

    Raises
    ------
    RunStopped
        Units are missing; they are named with the parts that do them.
    LeaseError
        A part is still at work.
    ValueError
        No run has begun there.
    """
    folder = folder.expanduser().absolute()
    settings = known_settings(folder)
    stop = stop or threading.Event()
    with stopped_in_words(folder):
        _wait_for_the_dead(folder, stop)
        check_folder(settings)
        source = open_source_of(settings)
        reference, origin = prepare_reference(settings, source)
        nobody = InProcess(2**63, stop)
        with driving(folder) as held:
            plan, parts = _known(folder)
            if plan.frames != source.shape[0]:
                raise ValueError(
                    f"the parts of {folder} did {plan.frames} frames, and there are {source.shape[0]} now. Start all "
                    "parts again, or 'stillframe run' as a whole: either does only what is new."
                )
            whole = Pass(source, plan, settings, reference, origin, nobody, held)
            if missing := whole.missing():
                raise RunStopped(_in_words(missing, plan, parts))
            return whole.put_together(whole.failures())


def _wait_for_the_dead(folder: Path, stop: threading.Event) -> None:
    """Wait while a part on another machine, which may have been killed just now, counts as alive."""
    until = time.monotonic() + STALE + HEARTBEAT + SKEW
    while (found := read_leases(folder)) and time.monotonic() < until:
        if any(holder.host == socket.gethostname() for holder in found):
            return
        if stop.wait(_LOOK_EVERY):
            raise KeyboardInterrupt


def _known(folder: Path) -> tuple[Plan, int]:
    stored = read_stored_plan(folder)
    if stored is None:
        raise ValueError(f"{folder / 'plan.json'} is damaged. Start any part again: it is written anew.")
    return stored.plan, stored.parts


def _in_words(missing: list[Unit], plan: Plan, parts: int) -> str:
    """Say which frames are missing, and which parts do them."""
    frames = sum(unit.stop - unit.start for unit in missing)
    shares = [Share(number, parts) for number in range(1, parts + 1)]
    numbers = {unit.number for unit in missing}
    concerned = [share for share in shares if numbers & {unit.number for unit in share.units(plan.units)}]
    again = ",".join(str(share.number) for share in concerned)
    advice = (
        f"Start part {again} of {parts} again (sbatch --array={again}): it does" if parts else "Run it again: it does"
    )
    ranges = first_few([str(unit) for unit in _joined(missing)])
    return f"{frames} of {plan.frames} frames are missing: {ranges}. {advice} those only. What is there is kept."


def _joined(units: list[Unit]) -> list[Unit]:
    """Make one of units that follow each other."""
    runs: list[list[Any]] = [
        [unit for _, unit in group] for _, group in groupby(enumerate(units), lambda one: one[0] - one[1].number)
    ]
    return [Unit(run[0].number, run[0].start, run[-1].stop) for run in runs]
