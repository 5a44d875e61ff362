"""What batch systems are asked for; a real Slurm is tried in tests/slurm."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from faulty import wait_for
from stillframe.cluster.job_settings import SYSTEMS, JobSettings, read_job_settings, with_run_settings
from stillframe.cluster.jobqueue import JobWatch, arguments, cluster_class, ended_slurm_jobs
from stillframe.cluster.security import make_keys
from stillframe.errors import RunStopped
from stillframe.settings import Settings

OURS = Path(__file__).parents[2] / "cluster" / "slurm.toml"


@pytest.fixture
def script(tmp_path):
    """The job script that a file of jobs comes to; no batch system is asked."""
    pytest.importorskip("dask_jobqueue")
    keys = make_keys(tmp_path / "keys")

    def made(jobs):
        settings = Settings(frames="frames.zarr", out=tmp_path / "run")
        given = arguments(with_run_settings(jobs, settings, tmp_path / "jobs"), keys, "word")
        given = {name: value for name, value in given.items() if name not in ("scheduler_options",)}
        return cluster_class(jobs.system).job_cls("tls://10.0.0.1:8786", name="worker", **given).job_script()

    return made


@pytest.mark.parametrize("system", SYSTEMS)
class TestEveryJobScript:
    def test_asks_for_one_process_that_leaves_in_time(self, script, system):
        words = script(JobSettings(system=system, walltime="04:00:00")).split()
        assert words[words.index("--lifetime") + 1] == "13800s"
        assert words[words.index("--lifetime-stagger") + 1] == "300s"
        assert words[words.index("--nthreads") + 1] == "1"
        assert "--nworkers" not in words
        assert words[words.index("--death-timeout") + 1] == "60"

    def test_encrypts_and_switches_pages_off(self, script, system):
        text = script(JobSettings(system=system))
        assert "--protocol tls" in text
        assert all(f"--tls-{name} " in text for name in ("ca-file", "cert", "key"))
        assert "--dashboard-address 127.0.0.1:0 --no-dashboard" in text
        assert "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'" in text

    def test_sets_every_pool_of_threads_to_one(self, script, system):
        text = script(JobSettings(system=system))
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        for name in (*pools, "BLOSC_NTHREADS", "ZARR_THREADING__MAX_WORKERS"):
            assert f"export {name}=1\n" in text

    def test_is_not_started_again_by_the_batch_system(self, script, system):
        sign = {"slurm": "#SBATCH --no-requeue", "pbs": "#PBS -r n", "lsf": "#BSUB -rn", "sge": "#$ -r n"}[system]
        assert sign in script(JobSettings(system=system))

    def test_holds_what_users_add(self, script, system):
        jobs = JobSettings(
            system=system,
            queue="long",
            account="mine",
            scratch="/local",
            directives=["--other"],
            prologue=["module load gcc"],
        )
        text = script(jobs)
        for word in ("long", "mine", 'mktemp -d "/local/', "--other", "\nmodule load gcc\n", sys.executable):
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
    assert f" {written}" in script(JobSettings(system=system, walltime=walltime)).replace("=", " ")


@pytest.mark.parametrize("walltime", ["00:01:00", "00:10:00", "04:00:00", "7-00:00:00"])
def test_every_worker_leaves_before_its_walltime(walltime):
    jobs = JobSettings(system="slurm", walltime=walltime)
    lifetime, stagger = jobs.leaves_after
    assert 0.8 * jobs.seconds < lifetime - stagger < lifetime + stagger < jobs.seconds


def test_the_file_that_users_copy_is_read():
    jobs = read_job_settings(str(OURS))
    assert (jobs.system, jobs.jobs, jobs.memory, jobs.seconds) == ("slurm", 16, 4.0, 4 * 3600)


@pytest.mark.parametrize(
    "line", [line[2:] for line in OURS.read_text().splitlines() if " = " in line and line[0] == "#"]
)
def test_every_line_that_it_suggests_is_understood(line, tmp_path):
    (tmp_path / "jobs.toml").write_text(f'system = "slurm"\n{line}\n')
    assert (
        read_job_settings(str(tmp_path / "jobs.toml")) != JobSettings(system="slurm")
        or "default" in line
        or "TMPDIR" in line
    )


def test_a_name_alone_will_do():
    assert read_job_settings("pbs") == JobSettings(system="pbs")


def test_mistakes_are_told_all_at_once(tmp_path):
    file = tmp_path / "jobs.toml"
    file.write_text('system = "slrm"\njobs = 0\nwalltime = "soon"\nqeue = "long"\n')
    with pytest.raises(ValueError, match="cannot be used:") as told:
        read_job_settings(str(file))
    assert all(word in str(told.value) for word in (str(file), "slrm", "jobs = 0", "soon", "qeue"))


def test_neither_a_name_nor_a_file_is_told():
    with pytest.raises(FileNotFoundError, match="neither local, slurm, pbs, lsf, sge nor a file"):
        read_job_settings("condor")


def test_what_a_run_says_goes_before_what_the_file_says():
    settings = Settings(frames="frames.zarr", out="run", workers=3, memory=7.0)
    jobs = with_run_settings(JobSettings(system="slurm"), settings, Path("jobs"))
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
        "import signal; from stillframe.cluster.jobqueue import cluster_class;"
        "signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "cluster_class('slurm'); assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Put a squeue first in the path that prints an answer."""

    def answer(words, status):
        (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{words}'\nexit {status}\n")
        (tmp_path / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return answer


@pytest.mark.parametrize(
    ("answer", "status", "ended"),
    [
        ("11 RUNNING\n12 PENDING", 0, []),
        ("11 RUNNING", 0, ["12"]),
        ("11 RUNNING\n12 CANCELLED", 0, ["12"]),
        ("slurm_load_jobs error: Invalid job id specified", 1, ["11", "12"]),
        ("slurm_load_jobs error: Unable to contact slurm controller", 1, []),
    ],
)
def test_ended_jobs_are_read_from_squeue(squeue, answer, status, ended):
    squeue(answer, status)
    assert ended_slurm_jobs(["11", "12"]) == ended


def job_watch(tmp_path, workers=(), jobs=(), **given):
    """A watch of a cluster with connected workers and with jobs, by name; and the names that it has replaced."""
    replaced = []
    cluster = SimpleNamespace(
        scheduler_info={"workers": {name: {"name": name} for name in workers}},
        workers={name: SimpleNamespace(job_id=number) for name, number in dict(jobs).items()},
        loop=SimpleNamespace(add_callback=lambda _, names: replaced.extend(names)),
        scale_down=None,
    )
    return JobWatch(cluster, JobSettings(**{"system": "slurm", "jobs": 2, "log": tmp_path} | given)), replaced


class TestJobWatch:
    def test_stops_the_run_if_all_jobs_end_before_their_worker_connects(self, tmp_path):
        (tmp_path / "stillframe-1.err").write_text("srun: oops\n/bin/python: No such file or directory\n")
        watch, _ = job_watch(tmp_path)
        watch.refuse_hopeless()
        watch._ended = 4
        with pytest.raises(RunStopped, match=r"4 jobs ended .* \(/bin/python: No such file or directory\)"):
            watch.refuse_hopeless()

    def test_does_not_stop_a_run_with_a_worker(self, tmp_path, monkeypatch):
        """Workers leave before their walltime, and their jobs end, for days."""
        monkeypatch.setattr("stillframe.cluster.jobqueue._ASK_EVERY", 0.01)
        watch, _ = job_watch(tmp_path, workers=["worker-1"], jobs={"worker-1": "11"})
        watch._ended = 4
        watch.refuse_hopeless()
        with watch.watching():
            wait_for(lambda: not watch._ended)

    def test_replaces_an_ended_job_after_a_while(self, tmp_path, monkeypatch):
        """Dask replaces those whose worker was connected once by itself, and earlier."""
        monkeypatch.setattr("stillframe.cluster.jobqueue.ended_slurm_jobs", lambda numbers: numbers)
        watch, replaced = job_watch(tmp_path, ["worker-1"], {"worker-1": "11", "worker-2": "12"})
        watch._replace()
        assert replaced == []
        watch._ended_since["12"] -= 21
        watch._replace()
        assert replaced == ["worker-2"]

    @pytest.mark.parametrize("system", SYSTEMS)
    def test_replaces_a_job_that_could_not_be_submitted(self, tmp_path, system):
        watch, replaced = job_watch(tmp_path, ["worker-1"], {"worker-1": "11", "worker-2": None}, system=system)
        watch._replace()
        assert replaced == ["worker-2"]

    def test_asks_no_other_system_about_jobs(self, tmp_path, monkeypatch):
        monkeypatch.setattr("stillframe.cluster.jobqueue.ended_slurm_jobs", lambda _: pytest.fail("asked"))
        watch, replaced = job_watch(tmp_path, jobs={"worker-1": "11"}, system="pbs")
        watch._replace()
        assert replaced == []
