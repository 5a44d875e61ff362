"""What batch systems are asked for; a real Slurm is tried in tests/slurm."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillframe.batchsystems import Replacer, _ended_of, arguments, cluster_class
from stillframe.doors import make_keys
from stillframe.errors import RunStopped
from stillframe.jobs import SYSTEMS, Jobs, read_jobs, with_settings
from stillframe.settings import Settings

OURS = Path(__file__).parents[1] / "cluster" / "slurm.toml"


@pytest.fixture
def script(tmp_path):
    """The job script that a file of jobs comes to; no batch system is asked."""
    pytest.importorskip("dask_jobqueue")
    keys = make_keys(tmp_path / "keys")

    def made(jobs):
        settings = Settings(frames="frames.zarr", out=tmp_path / "run")
        given = arguments(with_settings(jobs, settings, tmp_path / "jobs"), keys, "word")
        given = {name: value for name, value in given.items() if name not in ("scheduler_options",)}
        return cluster_class(jobs.system).job_cls("tls://10.0.0.1:8786", name="worker", **given).job_script()

    return made


@pytest.mark.parametrize("system", SYSTEMS)
class TestEveryJobScript:
    def test_asks_for_one_process_that_leaves_in_time(self, script, system):
        words = script(Jobs(system=system, walltime="04:00:00")).split()
        assert words[words.index("--lifetime") + 1] == "13800s"
        assert words[words.index("--lifetime-stagger") + 1] == "300s"
        assert words[words.index("--nthreads") + 1] == "1"
        assert "--nworkers" not in words
        assert words[words.index("--death-timeout") + 1] == "60"

    def test_closes_the_doors(self, script, system):
        text = script(Jobs(system=system))
        assert "--protocol tls" in text
        assert all(f"--tls-{name} " in text for name in ("ca-file", "cert", "key"))
        assert "--dashboard-address 127.0.0.1:0 --no-dashboard" in text
        assert "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'" in text

    def test_sets_every_pool_of_threads_to_one(self, script, system):
        text = script(Jobs(system=system))
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        for name in (*pools, "BLOSC_NTHREADS", "ZARR_THREADING__MAX_WORKERS"):
            assert f"export {name}=1\n" in text

    def test_is_not_started_again_by_the_batch_system(self, script, system):
        sign = {"slurm": "#SBATCH --no-requeue", "pbs": "#PBS -r n", "lsf": "#BSUB -rn", "sge": "#$ -r n"}[system]
        assert sign in script(Jobs(system=system))

    def test_holds_what_users_add(self, script, system):
        jobs = Jobs(
            system=system,
            queue="long",
            account="mine",
            scratch="/local",
            directives=["--other"],
            prologue=["module load gcc"],
        )
        text = script(jobs)
        for word in ("long", "mine", '--local-directory "/local"', "--other", "\nmodule load gcc\n", sys.executable):
            assert word in text


@pytest.mark.parametrize(
    ("system", "walltime", "written"),
    [
        ("slurm", "1-02:00:00", "26:00:00"),
        ("pbs", "96:00:00", "96:00:00"),
        ("sge", "00:30:00", "00:30:00"),
        ("lsf", "26:05:00", "26:05"),
    ],
)
def test_walltimes_are_written_as_the_batch_system_reads_them(script, system, walltime, written):
    assert f" {written}" in script(Jobs(system=system, walltime=walltime)).replace("=", " ")


@pytest.mark.parametrize("walltime", ["00:01:00", "00:10:00", "04:00:00", "7-00:00:00"])
def test_every_worker_leaves_before_its_walltime(walltime):
    jobs = Jobs(system="slurm", walltime=walltime)
    lifetime, stagger = jobs.leaves_after
    assert 0.8 * jobs.seconds < lifetime - stagger < lifetime + stagger < jobs.seconds


def test_the_file_that_users_copy_is_read():
    jobs = read_jobs(str(OURS))
    assert (jobs.system, jobs.jobs, jobs.memory, jobs.seconds) == ("slurm", 16, 4.0, 4 * 3600)


@pytest.mark.parametrize(
    "line", [line[2:] for line in OURS.read_text().splitlines() if " = " in line and line[0] == "#"]
)
def test_every_line_that_it_suggests_is_understood(line, tmp_path):
    (tmp_path / "jobs.toml").write_text(f'system = "slurm"\n{line}\n')
    assert read_jobs(str(tmp_path / "jobs.toml")) != Jobs(system="slurm") or "default" in line or "TMPDIR" in line


def test_a_name_alone_will_do():
    assert read_jobs("pbs") == Jobs(system="pbs")


def test_mistakes_are_told_all_at_once(tmp_path):
    file = tmp_path / "jobs.toml"
    file.write_text('system = "slrm"\njobs = 0\nwalltime = "soon"\nqeue = "long"\n')
    with pytest.raises(ValueError, match="cannot be used:") as told:
        read_jobs(str(file))
    assert all(word in str(told.value) for word in (str(file), "slrm", "jobs = 0", "soon", "qeue"))


def test_neither_a_name_nor_a_file_is_told():
    with pytest.raises(FileNotFoundError, match="neither local, slurm, pbs, lsf, sge nor a file"):
        read_jobs("condor")


def test_what_a_run_says_goes_before_what_the_file_says():
    settings = Settings(frames="frames.zarr", out="run", workers=3, memory=7.0)
    jobs = with_settings(Jobs(system="slurm"), settings, Path("jobs"))
    assert (jobs.jobs, jobs.memory, jobs.log) == (3, 7.0, Path("jobs"))


def test_a_folder_with_the_name_of_a_batch_system_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    assert Settings(frames="frames.zarr", out="run", cluster="slurm").cluster == "slurm"
    (tmp_path / "slurm.toml").touch()
    assert Settings(frames="frames.zarr", out="run", cluster="slurm.toml").cluster == str(tmp_path / "slurm.toml")


def test_ctrl_c_is_heard_as_before_when_dask_jobqueue_is_there():
    pytest.importorskip("dask_jobqueue")
    script = (
        "import signal; from stillframe.batchsystems import cluster_class;"
        "signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "cluster_class('slurm'); assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Let a command of a batch system answer so."""

    def set_up(name, told, status=0):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{told}'\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return set_up


@pytest.mark.parametrize(
    ("system", "name", "told", "status", "ended"),
    [
        ("slurm", "squeue", "11 RUNNING\n12 PENDING", 0, []),
        ("slurm", "squeue", "11 RUNNING", 0, ["12"]),
        ("slurm", "squeue", "11 RUNNING\n12 CANCELLED", 0, ["12"]),
        ("slurm", "squeue", "slurm_load_jobs error: Invalid job id specified", 1, ["11", "12"]),
        ("slurm", "squeue", "slurm_load_jobs error: Unable to contact slurm controller", 1, []),
        ("pbs", "qstat", "11.host stillframe me R\nqstat: Unknown Job Id 12.host", 153, []),
        ("pbs", "qstat", "11.host stillframe me R\nqstat: 12 Job has finished", 35, []),
        ("pbs", "qstat", "qstat: cannot connect to server", 111, []),
        ("lsf", "bjobs", "11 me RUN normal\n12 me EXIT normal", 0, ["12"]),
        ("sge", "qstat", "job_number: 11\nFollowing jobs do not exist: 13", 1, ["12"]),
    ],
)
def test_jobs_that_ended_are_found(answers, system, name, told, status, ended):
    answers(name, told, status)
    assert _ended_of(system, ["11", "12"]) == ended


def test_jobs_that_all_end_before_their_worker_connects_stop_the_run(tmp_path):
    """Nobody would ever come: what the last one said is told."""
    (tmp_path / "stillframe-1.err").write_text("srun: oops\n/bin/python: No such file or directory\n")
    cluster = SimpleNamespace(scheduler_info={"workers": {}})
    replacer = Replacer(cluster, Jobs(system="slurm", jobs=2, log=tmp_path))
    replacer.refuse_hopeless(0)
    replacer._ended = 4
    with pytest.raises(RunStopped, match=r"4 jobs ended .* \(/bin/python: No such file or directory\)"):
        replacer.refuse_hopeless(0)


def test_jobs_that_end_now_and_then_are_no_reason_to_stop(tmp_path, monkeypatch):
    """As workers do before their walltime, for days."""
    monkeypatch.setattr("stillframe.batchsystems._ASK_EVERY", 0.01)
    cluster = SimpleNamespace(scheduler_info={"workers": {"tls://1": {"name": "worker-1"}}})
    replacer = Replacer(cluster, Jobs(system="slurm", jobs=1, log=tmp_path))
    replacer._ended = 2
    with replacer.watching():
        while replacer._ended:
            time.sleep(0.01)
    replacer.refuse_hopeless(0)


def test_a_job_counts_as_one_whose_worker_never_connected_when_dask_has_not_heard_of_it_for_long(monkeypatch, tmp_path):
    gone = []
    loop = SimpleNamespace(add_callback=lambda _, names: gone.extend(names))
    workers = {"worker-1": SimpleNamespace(job_id="11"), "worker-2": SimpleNamespace(job_id="12")}
    here = {"tls://1": {"name": "worker-1"}}
    cluster = SimpleNamespace(scheduler_info={"workers": here}, workers=workers, loop=loop, scale_down=None)
    monkeypatch.setattr("stillframe.batchsystems._ended_of", lambda _, numbers: numbers)
    replacer = Replacer(cluster, Jobs(system="slurm", jobs=2, log=tmp_path))
    replacer._replace()
    assert gone == []
    replacer._over["12"] -= 21
    replacer._replace()
    assert gone == ["worker-2"]
