import json
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import typer
import xarray as xr

from stillframe import cli


def stillframe(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "stillframe", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.mark.parametrize(("stopping", "status"), [(False, 2), (True, 130)])
def test_errors_while_a_run_is_being_stopped_count_as_stopped(stopping, status, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", typer.Typer())

    @cli.command
    def breaks():
        raise TimeoutError("the scheduler is gone")

    signalled = threading.Event()
    monkeypatch.setattr(cli, "_stopping", signalled)
    if stopping:
        signalled.set()
    with pytest.raises(typer.Exit) as ended:
        breaks()
    assert ended.value.exit_code == status
    assert "Error: the scheduler is gone" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("moment", "status", "printed"),
    [
        ("cli.app = lambda: (print('done'), stop())", 130, "done\n"),  # before or after the command's own code
        ("cli.app.callback()(stop); sys.argv[1:] = ['status', 'run']", 130, ""),  # while typer reads the arguments
        ("cli.app = lambda: (print('done'), atexit.register(stop), sys.exit(1))", 1, "done\n"),  # while Python ends
    ],
)
def test_a_signal_outside_of_a_command_ends_it_in_words(moment, status, printed, number):
    code = f"import atexit, os, sys\nfrom stillframe import cli\nstop = lambda: os.kill(os.getpid(), {int(number)})\n"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}{moment}\ncli.main()"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == status
    assert ended.stdout == printed
    assert ended.stderr == (f"{cli._STOPPED}\n" if status == 130 else "")


def while_garbage_is_collected(what, before=""):
    """Run a command in whose garbage collection something happens, where Python catches all exceptions."""
    code = (
        "import gc, os, signal; from stillframe import cli\n"
        "stop = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"gc.callbacks.append(lambda phase, info: {what} if phase == 'start' else None)\n"
        f"cli.app = lambda: ({before} gc.collect(), gc.callbacks.clear(), print('done'))\ncli.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_a_signal_lost_in_the_garbage_collector_ends_a_command():
    assert while_garbage_is_collected("stop()") == (130, "", f"{cli._STOPPED}\n")


def test_a_signal_lost_in_the_garbage_collector_is_left_to_a_command_that_asks_for_it():
    assert while_garbage_is_collected("stop()", "cli._stop_event(),") == (0, "done\n", "")


def test_other_exceptions_lost_in_the_garbage_collector_are_printed():
    status, printed, told = while_garbage_is_collected("1 / 0")
    assert (status, printed) == (0, "done\n") and "ZeroDivisionError" in told


@pytest.mark.parametrize("nobody", [">&-", "| true"])
def test_where_nobody_listens_there_is_no_traceback(nobody):
    ended = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m stillframe --help {nobody}"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_an_exit_without_a_status_is_success():
    code = "import sys; from stillframe import cli; cli.app = sys.exit; cli.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
def test_simulate_then_the_command_it_prints(tmp_path):
    made = stillframe("simulate", tmp_path / "sim", "--frames", 6, "--height", 64, "--width", 80, "--pattern", "spots")
    assert made.returncode == 0
    line = re.search(r"Next: stillframe (run .*)", made.stdout)[1].split()
    done = stillframe(*line, "--reference", "0", "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert "6 frames" in done.stdout
    with xr.open_zarr(tmp_path / "sim" / "run" / "shifts.zarr", chunks=None) as shifts:
        assert shifts["shift"].shape == (6, 2)


@pytest.mark.slow
def test_the_demonstration_prints_the_true_errors(tmp_path):
    shown = stillframe("demo", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    masked, plain = (
        re.search(rf"{name}.*?(\d+)\s+([\d.]+)\s+([\d.]+)", shown.stdout) for name in ("masked", "without")
    )
    assert np.hypot(float(masked[2]), float(masked[3])) < np.hypot(float(plain[2]), float(plain[3])) / 2
    assert (tmp_path / "stillframe-demo" / "run" / "aligned.zarr").is_dir()
    with (
        xr.open_zarr(tmp_path / "stillframe-demo" / "run" / "shifts.zarr", chunks=None) as shifts,
        xr.open_zarr(tmp_path / "stillframe-demo" / "frames.zarr", chunks=None) as truth,
    ):
        error = (shifts["shift"] - truth["true_shift"].values).values
    rms = np.sqrt(np.nanmean((error - np.nanmedian(error, axis=0)) ** 2, axis=0))
    np.testing.assert_allclose(rms, [float(masked[2]), float(masked[3])], atol=6e-4)


@pytest.mark.slow
def test_the_selftest_moves_the_users_own_frames(stored, tmp_path):
    frames, mask = stored
    shown = stillframe("selftest", frames, "--mask", mask, "--max-shift", 12, "--count", 40, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "error / sigma" in shown.stdout
    report = json.loads((tmp_path / "selftest.json").read_text())
    assert report["failed"] == 0
    assert 0.7 < np.mean(report["ratio"]) < 1.3
    assert np.abs(report["pull"]).max() < 0.02
    assert sum(report["fractions"]) == 80
    assert max(report["fractions"]) < 20


def test_the_selftest_first_checks_where_its_figures_go(stored, tmp_path):
    done = stillframe("selftest", stored[0], "--save", tmp_path / "nowhere" / "figures.json")
    assert done.returncode == 2
    assert "is no folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "nowhere.zarr", "--out", "run"), "nowhere.zarr does not exist. Check the path"),
        (("run", "--out", "run"), "frames: field required"),
        (("run", "a.zarr", "--out", "run", "--interpolation", "best"), "interpolation = 'best'"),
        (("run", "--settings", "nowhere.toml"), "nowhere.toml"),
        (("status", "."), "holds no run that has begun"),
        (("simulate", "x", "--pattern", "stripes"), "Choose rings or spots"),
        (("simulate", "x", "--height", "2"), "16"),
    ],
)
def test_mistakes_are_printed_without_traceback(arguments, words, tmp_path):
    done = stillframe(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
