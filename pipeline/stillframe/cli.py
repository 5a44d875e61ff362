"""The command line: run, status, simulate, demo."""

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console

from stillframe.errors import LeaseError, RunStopped

app = typer.Typer(
    help="Keep still what should be still: masked registration of stacks of detector frames.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

EXIT_PROBLEMS, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130
P = ParamSpec("P")


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def told(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command tell errors and interruptions in words, each with its exit status."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            err.print("Stopped. What is finished is kept: give the same command again to go on.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (OSError, RunStopped, LeaseError, TypeError, ValueError) as error:
            err.print(f"Error: {error}", markup=False)
            raise typer.Exit(EXIT_REFUSED) from error

    return wrapped


def _terminate(_number: int, _frame: FrameType | None) -> None:
    """Let a batch system's SIGTERM end a run as Ctrl-C does."""
    raise KeyboardInterrupt


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@app.command()
@told
def run(
    frames: Annotated[Path | None, typer.Argument(help="Zarr array or group of the frames.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Valid pixels: npy, tif, png or Zarr; non-zero = valid.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    settings: Annotated[Path | None, typer.Option(help="TOML file of settings; flags override it.")] = None,
    reference: Annotated[str | None, typer.Option(help='Frames to average ("0:16", "100"), or a file.')] = None,
    reference_iterations: Annotated[int | None, typer.Option(help="Rounds of registering and averaging them.")] = None,
    reference_kind: Annotated[str | None, typer.Option(help='Only frames of this kind, such as "unpumped".')] = None,
    max_shift: Annotated[int | None, typer.Option(help="Largest shift looked for, pixels.")] = None,
    overlap_ratio: Annotated[float | None, typer.Option(help="Least overlap, part of the largest.")] = None,
    saturation: Annotated[float | None, typer.Option(help="Pixel value at which the detector saturates.")] = None,
    subpixel: Annotated[bool | None, typer.Option(help="Refine to fractions of a pixel (default).")] = None,
    weights: Annotated[str | None, typer.Option(help="counts (inverse variance) or uniform.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="nearest, linear, cubic or lanczos.")] = None,
    fill: Annotated[float | None, typer.Option(help="Value of pixels nothing was observed for.")] = None,
    missing_chunks: Annotated[str | None, typer.Option(help="report, or fill as Zarr does.")] = None,
    unit_frames: Annotated[int | None, typer.Option(help="Frames of a unit (an output shard).")] = None,
    workers: Annotated[int | None, typer.Option(help="Local worker processes; 0: work in this one.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address or file of a running dask scheduler.")] = None,
    memory: Annotated[float | None, typer.Option(help="Memory per worker, GiB.")] = None,
) -> None:
    """Register and align frames; give the same command again to go on after any stop."""
    flags = _given({name: value for name, value in locals().items() if name != "settings"})
    from stillframe.batch import run as run_batch
    from stillframe.settings import make_settings, read_toml

    result = run_batch(make_settings((read_toml(settings) if settings else {}) | flags))
    _tell(result)
    if result.problems:
        raise typer.Exit(EXIT_PROBLEMS)


def _tell(result: Any) -> None:
    out.print(f"{result.frames} frames, {result.good} with a shift and no flag.")
    out.print(f"shifts   {result.shifts}")
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
