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
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console

from stillframe.errors import LeaseError, RunStopped

if TYPE_CHECKING:
    from stillframe.settings import Settings

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


def main() -> None:
    """Run the command line."""
    logging.lastResort = None  # what libraries say is in the run's log
    for number in _SIGNALS:
        signal.signal(number, _stop)
    try:
        app()
    except SystemExit as end:
        if _stopping.is_set():
            sys.stdout.flush()
            # Python ends as if by SIGINT where one met an exec() of an import, however well it was handled.
            os._exit(EXIT_INTERRUPTED if end.code is None else int(end.code))
        raise


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_stopping = threading.Event()
"""Set by the first Ctrl-C or SIGTERM: an exception alone is lost where it happens to meet a destructor."""


def _stop(_number: int, _frame: FrameType | None) -> None:
    """End as by Ctrl-C, also on a batch system's SIGTERM; the second time at once, since nothing can be lost."""
    if _stopping.is_set():
        os.write(2, f"{_STOPPED}\n".encode())
        os._exit(EXIT_INTERRUPTED)
    _stopping.set()
    raise KeyboardInterrupt


def told(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command tell errors and interruptions in words, each with its exit status."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # all is said and done: another one must not look like a crash
            err.print(_STOPPED)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (OSError, RunStopped, LeaseError, TypeError, ValueError) as error:
            err.print(f"Error: {error}", markup=False)
            if not _stopping.is_set():
                raise typer.Exit(EXIT_REFUSED) from error
            err.print(_STOPPED)  # what breaks while a run is being stopped came of that
            raise typer.Exit(EXIT_INTERRUPTED) from error

    return wrapped


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


_FRAMES = Annotated[Path | None, typer.Argument(help="Zarr array or group of the frames.")]
_OPTIONS: dict[str, tuple[Any, str]] = {
    "mask": (Path, "Valid pixels: npy, tif, png or Zarr; non-zero = valid."),
    "out": (Path, "Folder for the results."),
    "settings": (Path, "TOML file of settings; flags override it."),
    "reference": (str, 'Frames to average ("0:16", "100"), or a file.'),
    "reference_iterations": (int, "Rounds of registering and averaging them."),
    "reference_kind": (str, 'Only frames of this kind, such as "unpumped".'),
    "max_shift": (int, "Largest shift looked for, pixels."),
    "overlap_ratio": (float, "Least overlap, part of the largest."),
    "saturation": (float, "Pixel value at which the detector saturates."),
    "subpixel": (bool, "Refine to fractions of a pixel (default)."),
    "weights": (str, "counts (inverse variance) or uniform."),
    "interpolation": (str, "nearest, linear, cubic or lanczos."),
    "fill": (float, "Value of pixels nothing was observed for."),
    "missing_chunks": (str, "report, or fill as Zarr does."),
    "input_check": (str, "Notice changed input by times, or by contents."),
    "unit_frames": (int, "Frames of a unit (an output shard)."),
    "workers": (int, "Local worker processes; 0: work in this one."),
    "scheduler": (str, "Address or file of a running dask scheduler."),
    "certificates": (Path, "Folder with ca.pem, cert.pem, key.pem for that scheduler."),
    "cluster": (str, "local, slurm, pbs, lsf, sge, or a TOML file of jobs."),
    "align": (bool, "Also align (default), or only register."),
    "memory": (float, "Memory per worker, GiB."),
}
"""Settings of a run as flags: their type, and what they are."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the settings of a run, from flags and from a file, as its first argument."""

    @functools.wraps(command)
    def wrapped(**flags: Any) -> None:
        from stillframe.settings import make_settings, read_toml

        own = {name: flags.pop(name) for name in names}
        file = flags.pop("settings")
        command(make_settings((read_toml(file) if file else {}) | _given(flags)), **own)

    own = list(inspect.signature(command).parameters.values())[1:]
    names = [parameter.name for parameter in own]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _settings_flags().items()
    ]
    wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*parameters, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    )
    wrapped.__annotations__ = _settings_flags() | {parameter.name: parameter.annotation for parameter in own}
    return wrapped


def _settings_flags() -> dict[str, Any]:
    flags = {name: Annotated[kind | None, typer.Option(help=text)] for name, (kind, text) in _OPTIONS.items()}
    return {"frames": _FRAMES, **flags}


@app.command()
@told
@with_settings
def run(
    settings: "Settings",
    follow: Annotated[
        bool, typer.Option("--follow", help="Frames are still being written: take them as they come.")
    ] = False,
    shard: Annotated[str | None, typer.Option(help="Only this part, such as 3/16; others run beside it.")] = None,
) -> None:
    """Register and align frames; give the same command again to go on after any stop."""
    if shard:
        _run_part(settings, shard, follow)
        return
    from stillframe.batch import run as run_batch

    result = run_batch(settings, follow=follow, stop=_stopping)
    _tell(result)
    if result.problems:
        raise typer.Exit(EXIT_PROBLEMS)


def _run_part(settings: "Settings", shard: str, follow: bool) -> None:
    from stillframe.parts import run_part
    from stillframe.units import Share

    if follow:
        raise ValueError("--follow and --shard do not go together: parts are cut from a stack that is complete.")
    result = run_part(settings, Share.parse(shard), stop=_stopping)
    out.print(
        f"part {result.share}: {result.frames} frames. When all parts are done: stillframe gather {result.folder}"
    )
    if result.problems:
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
@told
def gather(folder: Annotated[Path, typer.Argument(help="Folder of a run in parts.")]) -> None:
    """Put together what 'run --shard' did, when all parts are done."""
    from stillframe.parts import gather as gather_parts

    result = gather_parts(folder, stop=_stopping)
    _tell(result)
    if result.problems:
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
@told
def certificates(folder: Annotated[Path, typer.Argument(help="Where ca.pem, cert.pem and key.pem go.")]) -> None:
    """Make certificates for a dask cluster that you start yourself; delete the folder when it ends."""
    from stillframe.doors import make_keys

    make_keys(folder.expanduser())
    names = f"--tls-ca-file {folder}/ca.pem --tls-cert {folder}/cert.pem --tls-key {folder}/key.pem"
    out.print(f"dask scheduler --protocol tls {names} ...\ndask worker {names} ...", markup=False)
    out.print(f"stillframe run ... --certificates {folder}", markup=False)


@app.command()
@told
@with_settings
def plan(
    settings: "Settings",
    pilot: Annotated[int | None, typer.Option(min=0, help="Units to try; 0: none, and no time is told.")] = None,
) -> None:
    """Tell what a run is going to take, and whether it fits, without touching its folder."""
    from stillframe.forecast import forecast
    from stillframe.progress import print_forecast

    if not print_forecast(forecast(settings, pilot=pilot, stop=_stopping), settings.out, out):
        raise typer.Exit(EXIT_REFUSED)


@app.command()
@told
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    repair: Annotated[bool, typer.Option("--repair", help="Do again what is broken, and nothing else.")] = False,
) -> None:
    """Compare every byte of a run's folder with what was recorded of it."""
    from stillframe.batch import run as run_batch
    from stillframe.progress import Meter, progress_bar
    from stillframe.verify import in_words, known_plan
    from stillframe.verify import repair as repair_folder
    from stillframe.verify import verify as verify_folder

    with progress_bar() as bar:
        found = verify_folder(folder, Meter(bar, "verify", known_plan(folder).frames, 0).add)
    for words in in_words(found.findings):
        out.print(words, markup=False)
    if not found.findings:
        out.print(f"All is well: {found.plan.frames} frames in {len(found.plan.units)} units, {found.files} files.")
        return
    if not repair:
        out.print("To do again what is broken, and nothing else: stillframe verify --repair " + str(folder))
        raise typer.Exit(EXIT_PROBLEMS)
    result = repair_folder(found, lambda settings: run_batch(settings, stop=_stopping))
    _tell(result)
    if result.problems or verify_folder(folder).findings:
        raise typer.Exit(EXIT_PROBLEMS)


def _tell(result: Any) -> None:
    out.print(f"{result.frames} frames, {result.good} with a shift and no flag.")
    out.print(f"shifts   {result.shifts}")
    if result.aligned.exists():
        out.print(f"aligned  {result.aligned}")
    out.print(f"picture  {result.folder / 'shifts.png'}")
    if result.problems:
        err.print(
            f"{len(result.problems)} problems; the frames concerned are flagged. Mend them and give the same command."
        )


@app.command()
@told
def status(folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Tell how far a run is, from any shell, at any moment."""
    from stillframe.progress import print_status

    if not print_status(folder, out):
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
@told
def simulate(
    folder: Annotated[Path, typer.Argument(help="Where frames.zarr and mask.npy go.")],
    frames: Annotated[int, typer.Option(min=1, help="Number of frames.")] = 200,
    height: Annotated[int, typer.Option(min=16, help="Pixels along y.")] = 512,
    width: Annotated[int, typer.Option(min=16, help="Pixels along x.")] = 512,
    pattern: Annotated[str, typer.Option(help="rings or spots.")] = "rings",
    dose: Annotated[float, typer.Option(help="Counts per pixel on the brightest ring or spot.")] = 50.0,
    max_drift: Annotated[float, typer.Option(min=0, help="Largest true shift, pixels.")] = 8.0,
    jumps: Annotated[int, typer.Option(min=0, help="Sudden jumps within the run.")] = 2,
    decay: Annotated[float, typer.Option(min=0, max=1, help="Part of the intensity lost by the end.")] = 0.3,
    dark_every: Annotated[int, typer.Option(min=0, help="Every n-th frame sees no beam; 0: none.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
) -> None:
    """Write a simulated experiment with known drift."""
    given = {name: value for name, value in locals().items() if name not in ("folder", "height", "width")}
    from stillframe.progress import Meter, progress_bar
    from stillframe.scene import Experiment
    from stillframe.simulate import simulate as write

    with progress_bar() as bar:
        experiment = Experiment(shape=(height, width), **given)
        store, mask = write(experiment, folder, on_unit=Meter(bar, "simulate", frames, 0).add)
    out.print(f"{store}\n{mask}\nNext: stillframe run {store} --mask {mask} --out {folder / 'run'}")


@app.command()
@told
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demonstration goes.")] = Path("stillframe-demo"),
) -> None:
    """Simulate a small experiment, register it on a local cluster, and compare with the truth."""
    from stillframe.demo import demonstrate

    demonstrate(folder, out)


@app.command()
@told
def selftest(
    frames: Annotated[Path, typer.Argument(help="Zarr array or group of the frames.")],
    mask: Annotated[Path | None, typer.Option(help="Valid pixels: npy, tif, png or Zarr; non-zero = valid.")] = None,
    reference: Annotated[
        str | None, typer.Option(help='Frames whose content is moved ("0:16", "0"), or a file.')
    ] = None,
    max_shift: Annotated[int, typer.Option(min=2, help="Largest shift looked for, pixels.")] = 32,
    count: Annotated[int, typer.Option(min=10, help="How many frames to make.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    save: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path("selftest.json"),
) -> None:
    """Move the content of your own frames by known sub-pixel amounts, and tell what is found."""
    from stillframe.frames import open_source
    from stillframe.prepare import prepare_reference, single_frame_noise
    from stillframe.progress import print_selftest
    from stillframe.selftest import selftest as test
    from stillframe.settings import make_settings

    if not save.parent.is_dir():
        raise FileNotFoundError(f"{save.parent} is no folder, so {save.name} cannot be written there. Make it first.")
    given = {"frames": frames, "mask": mask, "reference": reference, "max_shift": max_shift, "out": save.parent}
    settings = make_settings(_given(given))
    source = open_source(settings.frames)
    known, _ = prepare_reference(settings, source)
    report = test(known, single_frame_noise(source, known), frames=count, seed=seed)
    save.write_text(report.model_dump_json(indent=2))
    print_selftest(report, out)
    out.print(f"figures  {save}")
