"""A run in parts, without a scheduler: independent processes on one output, and a last one that gathers.

The first part that starts prepares the folder while the others wait; each then does its own units, under a lease of its
own. Parts agree through the folder alone, so that a batch system may start them at any time and on any node.
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

from stillframe.cluster.connect import executor
from stillframe.cluster.executors import Executor, InProcess, unit_budget
from stillframe.errors import RunStopped
from stillframe.log import log
from stillframe.partition import Plan, Share, Unit
from stillframe.settings import Settings
from stillframe.storage.durable import make_folder
from stillframe.storage.reference_store import load_reference
from stillframe.wording import first_few
from stillframe.workflow.begin import begin, check_folder, cut
from stillframe.workflow.driver import driving, stopped_in_words
from stillframe.workflow.lease import SILENCE, Holder, one_at_a_time, read_leases
from stillframe.workflow.run_folder import RunDescription, RunFolder, read_settings
from stillframe.workflow.stages import Pass, Result

_WITHOUT_EFFECT = {"workers", "memory", "scheduler", "certificates", "cluster"}
"""Settings that do not change any result."""
_LOOK_EVERY = 1.0
"""Seconds between two checks whether a part is still at work."""


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
            part.work()
            frames = sum(unit.stop - unit.start for unit in share.units(part.plan.units))
            log.info("part %s is finished: %d frames, %d problems", share, frames, len(part.problems))
            shutil.rmtree(part.held.drafts, ignore_errors=True)
            return PartResult(settings.out, share, frames, part.problems)


def _alone(settings: Settings) -> Settings:
    """Return the settings with work in this process, unless they ask for something else."""
    asked = settings.workers is not None or settings.cluster or settings.scheduler
    return settings if asked else settings.model_copy(update={"workers": 0})


@contextlib.contextmanager
def _begun(settings: Settings, share: Share, workers: Executor, stop: threading.Event) -> Iterator[Pass]:
    """Prepare the folder, or check that the part that did so has the same settings; then let the others go on."""
    folder, me = RunFolder(settings.out), Holder.me(share)
    make_folder(folder.path)
    with contextlib.ExitStack() as stack:
        with one_at_a_time(folder, stop) as now:
            check_folder(settings, me)
            others = read_leases(folder, now)
            stored = RunDescription.read(folder.description)
            if others:
                _refuse_other_settings(settings, stored, others[0])
            inputs = begin(settings)
            plan = cut(settings, inputs.source, unit_budget(workers))
            if others:
                _refuse_other_frames(folder, stored, plan, inputs.reference.digest)
            held = stack.enter_context(driving(folder, share))
            part = Pass(inputs, plan, workers, held, share, prepares=not others)
            held.drafts.mkdir(parents=True, exist_ok=True) if others else part.prepare()
        yield part


def _refuse_other_settings(settings: Settings, stored: RunDescription | None, other: Holder) -> None:
    before, now = stored.settings if stored else {}, settings.model_dump(mode="json", exclude_none=True)
    changed = [name for name in before | now if name not in _WITHOUT_EFFECT and before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"{other} works on {settings.out} with other settings: {', '.join(changed)}. All parts of a run must be "
            "given the same; wait for them, or stop them."
        )


def _refuse_other_frames(folder: RunFolder, stored: RunDescription | None, plan: Plan, digest: str) -> None:
    if stored is None or stored.plan != replace(plan, decodes=1):
        raise ValueError(
            f"other parts of {folder.path} began with {stored.frames if stored else 'an unknown number of'} frames, "
            f"and there are {plan.frames} now. Start parts when no frame is added any more; wait for the others, or "
            "stop them."
        )
    if load_reference(folder.reference).digest != digest:
        raise ValueError(
            f"the reference of {folder.path} changed since other parts began with it. Wait for them, or stop them, and "
            "start all parts again."
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
    run_folder, stop = RunFolder(folder.expanduser().absolute()), stop or threading.Event()
    settings = read_settings(run_folder)
    with stopped_in_words(run_folder.path):
        _wait_for_the_dead(run_folder, stop)
        check_folder(settings)
        inputs = begin(settings)
        with driving(run_folder) as held:
            stored = RunDescription.read(run_folder.description)
            if stored is None:
                raise ValueError(f"{run_folder.description} is damaged. Start any part again: it is written anew.")
            if stored.frames != inputs.source.shape[0]:
                raise ValueError(
                    f"the parts of {run_folder.path} did {stored.frames} frames, and there are "
                    f"{inputs.source.shape[0]} now. Start all parts again, or 'stillframe run' as a whole: either does "
                    "only what is new."
                )
            whole = Pass(inputs, stored.plan, InProcess(2**63, stop), held)
            if missing := whole.table.undone(stored.plan.units, align=settings.align, failed=False):
                raise RunStopped(_in_words(missing, stored.plan, stored.parts))
            return whole.finish()


def _wait_for_the_dead(folder: RunFolder, stop: threading.Event) -> None:
    """Wait while a part on another machine, which may have been killed just now, counts as alive."""
    until = time.monotonic() + SILENCE
    while (holders := read_leases(folder)) and time.monotonic() < until:
        if any(holder.host == socket.gethostname() for holder in holders):
            return
        if stop.wait(_LOOK_EVERY):
            raise KeyboardInterrupt


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
    """Return one unit for each run of neighbours."""
    runs = [[unit for _, unit in group] for _, group in groupby(enumerate(units), lambda one: one[0] - one[1].number)]
    return [Unit(run[0].number, run[0].start, run[-1].stop) for run in runs]
