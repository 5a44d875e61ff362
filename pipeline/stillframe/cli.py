"""The command line: run, gather, status, plan, verify, certificates, simulate, demo, selftest."""

import functools
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, ParamSpec, get_args

import typer
from pydantic.fields import FieldInfo
from rich.console import Console

from stillframe.errors import LeaseError, RunStopped
from stillframe.settings import Settings, make_settings, read_toml

app = typer.Typer(
    help="Keep still what should be still: masked registration of stacks of detector frames.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

_STOPPED = "Stopped. What is finished is kept: give the same command again to go on."
EXIT_PROBLEMS, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130
P = ParamSpec("P")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_stopping = threading.Event()
"""Set by the first SIGINT or SIGTERM: an exception alone is lost if it is raised in a destructor or by the garbage
collector."""
_heeded = threading.Event()
"""Set by commands that ask for ``_stopping`` again and again."""


def main() -> None:
    """Run the command line."""
    logging.lastResort = None  # warnings of libraries go to the run's log only
    sys.unraisablehook = _on_lost_exception
    _on_signals(_stop)
    try:
        status = _status_of_app()
        _flush()
        _on_signals(functools.partial(_leave, status))
    except KeyboardInterrupt:  # which may also come before or after the command's own code
        status = EXIT_INTERRUPTED
    if status == EXIT_INTERRUPTED:
        err.print(_STOPPED)
    if _stopping.is_set():
        # Python would end as if killed by SIGINT if the signal came during an import, even when it was handled.
        _flush()
        os._exit(status)
    sys.exit(status)


def _status_of_app() -> int:
    """Run the command that was asked for; return its exit status."""
    try:
        app()
    except SystemExit as end:
        if end.code is None:
            return EXIT_INTERRUPTED if _stopping.is_set() else 0
        return int(end.code)
    return 0


def _flush() -> None:
    """Write out what was printed, even if the terminal or pipe that it goes to was closed."""
    if sys.stdout is None:  # it was closed before Python began
        return
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call a handler on SIGINT and SIGTERM."""
    for number in _SIGNALS:
        signal.signal(number, handler)


def _stop(_number: int, _frame: FrameType | None) -> None:
    """Raise ``KeyboardInterrupt`` at the first SIGINT or SIGTERM; exit at once at the second, which loses no work."""
    if _stopping.is_set():
        _exit_at_once()
    _stopping.set()
    raise KeyboardInterrupt


def _exit_at_once() -> NoReturn:
    os.write(2, f"{_STOPPED}\n".encode())
    os._exit(EXIT_INTERRUPTED)


def _stop_event() -> threading.Event:
    """Return the event for a command that asks for it again and again, and stops when it is set."""
    _heeded.set()
    return _stopping


def _on_lost_exception(lost: "sys.UnraisableHookArgs") -> None:
    """Print an exception that nothing can catch; exit if it is that of a signal, which the command would not notice."""
    if not (_stopping.is_set() and issubclass(lost.exc_type, KeyboardInterrupt)):
        sys.__unraisablehook__(lost)
    elif not _heeded.is_set():
        _exit_at_once()


def _leave(status: int, _number: int, _frame: FrameType | None) -> None:
    """Exit at once with the status of a command that has ended: a signal comes too late to stop it."""
    os._exit(status)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Add a command that prints errors without a traceback, and exits with a status for each."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (OSError, RunStopped, LeaseError, TypeError, ValueError) as error:
            err.print(f"Error: {error}", markup=False)
            # After a signal, the error is a consequence of stopping.
            raise typer.Exit(EXIT_INTERRUPTED if _stopping.is_set() else EXIT_REFUSED) from error

    return app.command()(wrapped)


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Fill the first argument of a command with the settings of a run, made from flags and a file."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [parameter.replace(kind=keyword) for parameter in inspect.signature(function).parameters.values()][1:]
    kinds = _settings_flags()
    flags = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in kinds.items()]

    @functools.wraps(function)
    def wrapped(**values: Any) -> None:
        own_values = {parameter.name: values.pop(parameter.name) for parameter in own}
        file = values.pop("settings")
        given = {name: value for name, value in values.items() if value is not None}
        function(make_settings((read_toml(file) if file else {}) | given), **own_values)

    wrapped.__signature__ = inspect.Signature([*flags, *own])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*flags, *own)}
    return wrapped


def _settings_flags() -> dict[str, Any]:
    """Return the type of the flag of each field of the settings, with the docstring of the field as its help."""
    fields = {name: field for name, field in Settings.model_fields.items() if name not in ("version", "frames")}
    flags = {name: _flag(field) for name, field in fields.items()}
    file = Annotated[Path | None, typer.Option(help="TOML file of settings; flags override it.")]
    frames = Annotated[Path | None, typer.Argument(help=Settings.model_fields["frames"].description)]
    return {"frames": frames, "mask": flags.pop("mask"), "out": flags.pop("out"), "settings": file, **flags}


def _flag(field: FieldInfo) -> Any:
    types = get_args(field.annotation) or (field.annotation,)
    kind: Any = next((one for one in types if one in (Path, int, float, bool)), str)
    return Annotated[kind | None, typer.Option(help=" ".join(str(field.description).split()))]


@command
@with_settings
def run(
    settings: Settings,
    follow: Annotated[
        bool, typer.Option("--follow", help="Register frames as they come, while they are still being written.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="Do only this part, such as 3/16; other commands do the others.")
    ] = None,
) -> None:
    """Register and align frames; give the same command again to go on after any stop."""
    if shard:
        _run_part(settings, shard, follow)
        return
    from stillframe.workflow.driver import run as run_batch

    _report(run_batch(settings, follow=follow, stop=_stop_event()))


def _run_part(settings: Settings, shard: str, follow: bool) -> None:
    from stillframe.partition import Share
    from stillframe.workflow.parts import run_part

    if follow:
        raise ValueError("--follow and --shard do not go together: parts are cut from a stack that is complete.")
    result = run_part(settings, Share.parse(shard), stop=_stop_event())
    out.print(
        f"part {result.share}: {result.frames} frames. When all parts are done: stillframe gather {result.folder}"
    )
    if result.problems:
        raise typer.Exit(EXIT_PROBLEMS)


@command
def gather(folder: Annotated[Path, typer.Argument(help="Folder of a run in parts.")]) -> None:
    """Put together the results of 'run --shard', when all parts are done."""
    from stillframe.workflow.parts import gather as gather_parts

    _report(gather_parts(folder, stop=_stop_event()))


@command
def certificates(folder: Annotated[Path, typer.Argument(help="Where ca.pem, cert.pem and key.pem go.")]) -> None:
    """Make certificates for a dask cluster that you start yourself; delete the folder when it ends."""
    from stillframe.cluster.security import make_keys

    make_keys(folder.expanduser())
    names = f"--tls-ca-file {folder}/ca.pem --tls-cert {folder}/cert.pem --tls-key {folder}/key.pem"
    out.print(f"dask scheduler --protocol tls {names} ...\ndask worker {names} ...", markup=False)
    out.print(f"stillframe run ... --certificates {folder}", markup=False)


@command
@with_settings
def plan(
    settings: Settings,
    pilot: Annotated[
        int | None, typer.Option(min=0, help="Units to try first; 0: none, and no time is predicted.")
    ] = None,
) -> None:
    """Predict memory, disk space and time of a run, and whether they suffice, without touching its folder."""
    from stillframe.console import print_forecast
    from stillframe.workflow.forecast import forecast

    if not print_forecast(forecast(settings, pilot=pilot, stop=_stop_event()), settings.out, out):
        raise typer.Exit(EXIT_REFUSED)


@command
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    repair: Annotated[bool, typer.Option("--repair", help="Redo damaged units, and nothing else.")] = False,
) -> None:
    """Compare every byte of a run's folder with the recorded checksums."""
    from stillframe.progress import Meter, progress_bar
    from stillframe.workflow.driver import run as run_batch
    from stillframe.workflow.ledger import plan_of
    from stillframe.workflow.run_folder import RunFolder
    from stillframe.workflow.verify import in_words
    from stillframe.workflow.verify import repair as repair_folder
    from stillframe.workflow.verify import verify as verify_folder

    with progress_bar() as bar:
        checked = verify_folder(folder, Meter(bar, "verify", plan_of(RunFolder(folder)).frames, 0).add)
    for line in in_words(checked.findings):
        out.print(line, markup=False)
    if not checked.findings:
        out.print(
            f"All is well: {checked.plan.frames} frames in {len(checked.plan.units)} units, {checked.files} files."
        )
        return
    if not repair:
        out.print(f"To redo damaged units, and nothing else: stillframe verify --repair {folder}", markup=False)
        raise typer.Exit(EXIT_PROBLEMS)
    _report(repair_folder(checked, lambda settings: run_batch(settings, stop=_stop_event())))
    if verify_folder(folder).findings:
        raise typer.Exit(EXIT_PROBLEMS)


def _report(result: Any) -> None:
    """Print the figures and files of a run; exit with ``EXIT_PROBLEMS`` if some input could not be used."""
    out.print(f"{result.frames} frames, {result.good} with a shift and no flag.")
    out.print(f"shifts   {result.shifts}")
    if result.aligned.exists():
        out.print(f"aligned  {result.aligned}")
    out.print(f"picture  {result.folder / 'shifts.png'}")
    if result.problems:
        err.print(
            f"{len(result.problems)} problems; the frames concerned are flagged. Mend them and give the same command."
        )
        raise typer.Exit(EXIT_PROBLEMS)


@command
def status(folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Print how far a run is; works in any shell and at any time."""
    from stillframe.console import print_status
    from stillframe.workflow.status import read_status

    if not print_status(read_status(folder), out):
        raise typer.Exit(EXIT_PROBLEMS)


@command
def simulate(
    folder: Annotated[Path, typer.Argument(help="Where frames.zarr and mask.npy go.")],
    frames: Annotated[int, typer.Option(min=1, help="Number of frames.")] = 200,
    height: Annotated[int, typer.Option(min=16, help="Pixels along y.")] = 512,
    width: Annotated[int, typer.Option(min=16, help="Pixels along x.")] = 512,
    pattern: Annotated[str, typer.Option(help="rings or spots.")] = "rings",
    dose: Annotated[float, typer.Option(help="Counts per pixel on the brightest ring or spot.")] = 50.0,
    max_drift: Annotated[float, typer.Option(min=0, help="Largest true shift, pixels.")] = 8.0,
    jumps: Annotated[int, typer.Option(min=0, help="Sudden jumps within the run.")] = 2,
    decay: Annotated[float, typer.Option(min=0, max=1, help="Fraction of the intensity lost by the end.")] = 0.3,
    dark_every: Annotated[int, typer.Option(min=0, help="Every n-th frame has no beam; 0: none.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
) -> None:
    """Write a simulated experiment with known drift."""
    options = {name: value for name, value in locals().items() if name not in ("folder", "height", "width")}
    from stillframe.progress import Meter, progress_bar
    from stillframe.simulation.experiment import Experiment
    from stillframe.simulation.write import simulate as write

    with progress_bar() as bar:
        experiment = Experiment(shape=(height, width), **options)
        store, mask = write(experiment, folder, on_unit=Meter(bar, "simulate", frames, 0).add)
    out.print(f"{store}\n{mask}\nNext: stillframe run {store} --mask {mask} --out {folder / 'run'}")


@command
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demonstration goes.")] = Path("stillframe-demo"),
) -> None:
    """Simulate a small experiment, register it on a local cluster, and compare with the truth."""
    from stillframe.demo import demonstrate

    demonstrate(folder, out)


@command
def selftest(
    frames: Annotated[Path, typer.Argument(help="Zarr array or group of the frames.")],
    mask: Annotated[Path | None, typer.Option(help="Valid pixels: npy, tif, png or Zarr; non-zero = valid.")] = None,
    dark: Annotated[Path | None, typer.Option(help="Image without beam, subtracted from every frame.")] = None,
    flat: Annotated[Path | None, typer.Option(help="Response of the pixels, by which frames are divided.")] = None,
    reference: Annotated[
        str | None, typer.Option(help='Frames whose content is moved ("0:16", "0"), or an image.')
    ] = None,
    max_shift: Annotated[int, typer.Option(min=2, help="Largest shift searched, pixels.")] = 32,
    count: Annotated[int, typer.Option(min=10, help="Number of frames to make.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    save: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path("selftest.json"),
) -> None:
    """Move the content of your own frames by known sub-pixel amounts, and compare the measured shifts with them."""
    from stillframe.console import print_selftest
    from stillframe.simulation.selftest import selftest as test
    from stillframe.storage.frames import open_source
    from stillframe.workflow.run_reference import prepare_reference, single_frames

    if not save.parent.is_dir():
        raise FileNotFoundError(f"{save.parent} is no folder, so {save.name} cannot be written there. Make it first.")
    settings = make_settings(
        {
            "frames": frames,
            "mask": mask,
            "dark": dark,
            "flat": flat,
            "reference": reference,
            "max_shift": max_shift,
            "out": save.parent,
        }
    )
    source = open_source(settings.frames)
    prepared, _ = prepare_reference(settings, source)
    noise, fixed = single_frames(source, prepared)
    iterations = settings.reference_iterations
    report = test(prepared, noise, fixed=fixed, iterations=iterations, frames=count, seed=seed)
    save.write_text(report.model_dump_json(indent=2))
    print_selftest(report, out)
    out.print(f"figures  {save}")
