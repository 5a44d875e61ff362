"""Who is kept out: tried with a plain client, a foreign certificate, another user, and pages from elsewhere."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import dask
import psutil
import pytest

from stillframe.cluster.connect import executor
from stillframe.cluster.job_settings import JobSettings
from stillframe.cluster.jobqueue import arguments, started
from stillframe.cluster.security import (
    CERTIFICATES,
    known_keys,
    make_keys,
    private_folder,
    private_scratch,
    refuse_foreign,
    replaceable_by,
    require_secret_prefix,
    sweep,
    warn_of_open_folder,
    warn_without_tls,
)
from stillframe.settings import Settings

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be somebody else")


def mode(path):
    return oct(stat.S_IMODE(path.stat().st_mode))


class TestPrivateFolder:
    def test_is_its_owners_and_gone_at_the_end(self, tmp_path):
        with private_folder(tmp_path) as folder:
            make_keys(folder / "keys")
            assert mode(folder) == mode(folder / "keys") == "0o700"
            assert {mode(folder / "keys" / name) for name in CERTIFICATES} == {"0o600"}
        assert list(tmp_path.iterdir()) == []

    def test_of_a_living_session_is_left_alone(self, tmp_path):
        with private_folder(tmp_path) as folder, private_folder(tmp_path) as other:
            sweep(tmp_path)
            assert folder.is_dir() and other.is_dir()

    def test_of_a_session_that_was_killed_is_swept(self, tmp_path):
        script = (
            "import sys, time, pathlib; from stillframe.cluster.security import private_folder\n"
            "with private_folder(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
        with process:
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        (left,) = tmp_path.glob(".stillframe-*")
        assert left.is_dir()
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_that_is_just_being_made_is_left_alone(self, tmp_path):
        new = tmp_path / ".stillframe-0123456789abcdef.new"
        new.mkdir()
        (new / "lock").touch()
        sweep(tmp_path)
        assert new.is_dir()
        os.utime(new, (0, 0))
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_without_a_lock_is_swept_when_it_is_old(self, tmp_path):
        (tmp_path / ".stillframe-0123456789abcdef").mkdir()
        sweep(tmp_path)
        assert (tmp_path / ".stillframe-0123456789abcdef").is_dir()
        os.utime(tmp_path / ".stillframe-0123456789abcdef", (0, 0))
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == []

    @as_root
    def test_cannot_be_looked_into_by_another_user(self, tmp_path):
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o755)
        with private_folder(tmp_path) as folder:
            key = make_keys(folder / "keys").folder / "key.pem"
            told = subprocess.run(["cat", key], user="nobody", capture_output=True, text=True, check=False)
        assert "Permission denied" in told.stderr and not told.stdout


class TestKnownKeys:
    def test_are_those_that_were_made(self, tmp_path):
        made = make_keys(tmp_path / "keys")
        assert known_keys(tmp_path / "keys") == made
        assert made.security().require_encryption

    def test_are_never_written_over(self, tmp_path):
        make_keys(tmp_path / "keys")
        with pytest.raises(FileExistsError):
            make_keys(tmp_path / "keys")

    def test_name_what_is_missing(self, tmp_path):
        make_keys(tmp_path / "keys")
        (tmp_path / "keys" / "ca.pem").unlink()
        with pytest.raises(FileNotFoundError, match=r"holds no ca\.pem"):
            known_keys(tmp_path / "keys")

    @pytest.mark.parametrize(("bits", "who"), [(0o640, "its group"), (0o604, "everybody")])
    def test_that_others_can_read_are_refused(self, tmp_path, bits, who):
        keys = make_keys(tmp_path / "keys")
        (keys.folder / "key.pem").chmod(bits)
        with pytest.raises(PermissionError, match=f"can be read by {who}"):
            known_keys(keys.folder)

    @pytest.mark.parametrize("name", ["ca.pem", "cert.pem"])
    @pytest.mark.parametrize("bits", [0o620, 0o602])
    def test_that_others_can_write_are_refused(self, tmp_path, name, bits):
        keys = make_keys(tmp_path / "keys")
        (keys.folder / name).chmod(0o644)
        known_keys(keys.folder)
        (keys.folder / name).chmod(bits)
        with pytest.raises(PermissionError, match=rf"{name} can be written by .*, who could put a scheduler of theirs"):
            known_keys(keys.folder)


class TestSchedulerFile:
    @pytest.mark.parametrize("bits", [0o620, 0o602])
    def test_that_others_can_write_is_refused(self, tmp_path, bits):
        file = tmp_path / "scheduler.json"
        file.write_text("{}")
        file.chmod(bits)
        with pytest.raises(PermissionError, match="could put a scheduler of theirs"):
            refuse_foreign(file)

    @as_root
    def test_of_somebody_else_is_refused(self, tmp_path):
        file = tmp_path / "scheduler.json"
        file.write_text("{}")
        file.chmod(0o600)
        refuse_foreign(file)
        shutil.chown(file, "nobody")
        with pytest.raises(PermissionError, match="its owner, user"):
            refuse_foreign(file)


def test_an_output_that_anybody_may_change_is_told(tmp_path, capsys):
    warn_of_open_folder(tmp_path)
    tmp_path.chmod(0o777)
    warn_of_open_folder(tmp_path)
    assert capsys.readouterr().err.count("can be written by everybody") == 1


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("tls://10.0.0.1:8786", ""),
        ("inproc://10.0.0.1/1/1", ""),
        ("tcp://127.0.0.1:8786", "every user of this machine"),
        ("tcp://10.0.0.1:8786", "everybody on its network"),
    ],
)
def test_a_scheduler_without_tls_is_told(address, who, capsys):
    warn_without_tls(address)
    told = capsys.readouterr().err
    assert who in told and bool(told) == bool(who)


@pytest.fixture(scope="module")
def path_before():
    """The import path before any run of this module, with what plain clusters of other tests left on it."""
    return set(sys.path)


@pytest.fixture(scope="module", params=["local", "jobs"])
def local(request, tmp_path_factory, path_before):
    """What a run starts: workers on this machine, or the scheduler for jobs that a batch system is to start."""
    out = tmp_path_factory.mktemp("local") / "run"
    if request.param == "local":
        with executor(Settings(frames=out, out=out, workers=1), None, threading.Event()) as cluster:
            yield cluster.client.cluster
        return
    with pytest.MonkeyPatch.context() as patch:
        take_every_job(out.parent / "bin", patch)
        with private_folder(out.parent) as private:
            jobs = JobSettings(system="slurm", jobs=1, log=out.parent, interface="lo")
            with started(jobs, private) as client:
                yield client.cluster


def take_every_job(folder, patch):
    """Put commands in the way that take jobs and never start them."""
    folder.mkdir()
    for name in ("sbatch", "scancel"):
        (folder / name).write_text("#!/bin/sh\necho Submitted batch job 1\n")
        (folder / name).chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("terminal", [True, False])
def test_how_to_see_the_pages_is_told_to_nobody_else(tmp_path, capsys, monkeypatch, terminal):
    """On a terminal it is shown; elsewhere others may read what is said."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with pytest.MonkeyPatch.context() as patch, private_folder(tmp_path) as private:
        take_every_job(tmp_path / "bin", patch)
        with started(JobSettings(system="slurm", jobs=1, log=tmp_path, interface="lo"), private) as client:
            port = client.cluster.scheduler.http_server.port
            told = (private / "pages").read_text()
            line = rf"ssh -N -L {port}:127\.0\.0\.1:{port} \S+@\S+\nthen (http://127\.0\.0\.1:{port}/\S+)"
            found = re.search(line, told)
            assert page(found[1].replace("status", "health")) == 200
            word = found[1].split("/")[3]
    shown = capsys.readouterr().err
    assert (re.search(line, shown) is not None) == (word in shown) == terminal
    assert (str(private / "pages") in shown) != terminal


def page(address):
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.status


def refused(address):
    with pytest.raises(urllib.error.HTTPError) as error:
        page(address)
    with error.value as answer:
        return answer.code == 404


KNOCK = """
import sys
from pathlib import Path
from distributed import Client
from stillframe.cluster.security import Keys

try:
    keys = {"security": Keys(Path(sys.argv[2])).security()} if len(sys.argv) > 2 else {}
    with Client(sys.argv[1], timeout=3, **keys) as client:
        print("let in" if client.scheduler_info()["address"] == sys.argv[1] else "")
except Exception as error:
    print(type(error).__mro__)
"""


def knock_as_client(*arguments):
    """Try to connect from a process of its own, and return what came of it."""
    command = [sys.executable, "-c", KNOCK, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


class TestUninvited:
    def test_a_client_with_the_key_is_welcome(self, local, tmp_path):
        keys = local.security
        for name, content in zip(
            CERTIFICATES, (keys.tls_ca_file, keys.tls_client_cert, keys.tls_client_key), strict=True
        ):
            (tmp_path / name).write_text(content if "\n" in content else Path(content).read_text())
        assert knock_as_client(local.scheduler_address, tmp_path) == "let in"

    def test_a_plain_client_is_refused(self, local):
        assert "OSError" in knock_as_client(local.scheduler_address.replace("tls", "tcp"))
        assert "TypeError" in knock_as_client(local.scheduler_address)

    def test_a_foreign_certificate_is_refused(self, local, tmp_path):
        keys = make_keys(tmp_path / "keys")
        assert "OSError" in knock_as_client(local.scheduler_address, keys.folder)

    def test_plain_bytes_run_nothing(self, local):
        """As any process of another user on this machine could send them."""

        async def knock():
            host, port = local.scheduler_address.removeprefix("tls://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"\x00" * 64)
            with contextlib.suppress(ConnectionError):
                answer = await asyncio.wait_for(reader.read(100), 10)
                assert b"compression" not in answer  # what dask greets those with whom it talks
            writer.close()

        asyncio.run(knock())

    def test_pages_are_for_those_who_know_the_word(self, local):
        port = local.scheduler.http_server.port
        for name in ("", "status", "health", "info/main/workers.html", "sitemap.json", "json/counts.json", "metrics"):
            assert refused(f"http://127.0.0.1:{port}/{name}")

    def test_everything_listens_on_loopback(self, local):
        me = psutil.Process()
        listening = [
            connection.laddr.ip
            for process in (me, *me.children(recursive=True))
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) >= 2
        assert set(listening) == {"127.0.0.1"}

    def test_workers_have_no_pages(self, local):
        for worker in local.scheduler_info["workers"].values():
            assert refused(f"http://127.0.0.1:{worker['services']['dashboard']}/health")


@as_root
def test_nobody_else_can_write_where_modules_are_imported_from(local, path_before):
    """Dask's own scratch folder has a name that another user can take first; it lies on the import path."""
    workers = local.get_client().run(lambda: __import__("sys").path).values() if local.workers else []
    paths = {path for paths in (sys.path, *workers) for path in paths if "dask-scratch-space" in path} - path_before
    assert paths
    for path in paths:
        assert any(mode(folder) == "0o700" for folder in Path(path).parents)
        tried = subprocess.run(["touch", f"{path}/json.py"], user=65534, group=65534, check=False, capture_output=True)
        assert b"Permission denied" in tried.stderr


@as_root
def test_a_scratch_folder_that_another_user_made_first_is_not_used(tmp_path, monkeypatch):
    """The attack as it was shown: a package in the folder that dask would use."""
    tmp_path.chmod(0o1777)
    taken = tmp_path / "dask-scratch-space"
    taken.mkdir()
    shutil.chown(taken, 65534)
    taken.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with executor(Settings(frames=tmp_path, out=tmp_path / "run", workers=1), None, threading.Event()) as cluster:
        used = [*cluster.client.run(lambda dask_worker: dask_worker.local_directory).values()]
        assert not [path for path in (*used, *sys.path) if path.startswith(str(taken))]
    assert [path.name for path in tmp_path.iterdir()] == ["dask-scratch-space"], "the session's own folder is removed"


@as_root
@pytest.mark.parametrize("mode_", [0o777, 0o1777])
def test_a_temporary_folder_in_which_others_can_replace_ours_is_refused(tmp_path, mode_):
    base = tmp_path / "open"
    base.mkdir()
    base.chmod(mode_)
    refused = pytest.raises(PermissionError, match="everybody on this system.*Set TMPDIR")
    sticky = bool(mode_ & 0o1000)
    outcome = contextlib.nullcontext() if sticky else refused
    with dask.config.set({"temporary-directory": str(base)}), outcome, private_scratch():
        assert sticky
    assert list(base.iterdir()) == []


def test_a_folder_of_another_name_is_never_swept(tmp_path):
    other = tmp_path / ".stillframe-config"
    other.mkdir()
    os.utime(other, (0, 0))
    sweep(tmp_path)
    assert other.is_dir()


@as_root
def test_each_job_makes_a_scratch_folder_of_its_own(tmp_path):
    jobs = JobSettings(system="slurm", scratch="${TMPDIR:-/tmp}", log=tmp_path)
    given = arguments(jobs, make_keys(tmp_path / "keys"), "word")
    script = "\n".join([*given["job_script_prologue"], f"stat -c %a:%n {given['local_directory']}"])
    told = subprocess.run(["bash", "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True)
    mode_, _, path = told.stdout.decode().strip().partition(":")
    assert mode_ == "700" and path.startswith(f"{tmp_path}/stillframe.") and not Path(path).exists()


def test_a_worker_whose_scratch_others_can_change_is_unfit(tmp_path):
    tmp_path.chmod(0o700)
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    assert replaceable_by(own) == ""
    own.chmod(0o777)
    assert "everybody" in replaceable_by(own)
    own.chmod(0o700)
    tmp_path.chmod(0o777)
    assert "everybody" in replaceable_by(own)
    tmp_path.chmod(0o1777)
    assert replaceable_by(own) == ""


@as_root
def test_a_scratch_folder_of_another_user_is_told(tmp_path):
    shutil.chown(tmp_path, 65534)
    assert "user 65534" in replaceable_by(tmp_path)


def test_pages_below_the_word_are_there():
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0", scheduler_kwargs={"http_prefix": "/word/"}
    ) as cluster:
        require_secret_prefix(cluster.scheduler, "word")
        port = cluster.scheduler.http_server.port
        assert page(f"http://127.0.0.1:{port}/word/health") == 200
        assert refused(f"http://127.0.0.1:{port}/health")
        assert refused(f"http://127.0.0.1:{port}/wordless/health")


@as_root
@pytest.mark.skipif(not shutil.which("ip"), reason="no ip command to make a network namespace with")
def test_pages_cannot_be_reached_from_another_machine(local):
    """From a network namespace, joined to this one as a neighbour is by a cable."""
    name, port = f"sf{os.getpid()}", local.scheduler.http_server.port
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    try:
        for line in (
            f"link add {name}a type veth peer name {name}b netns {name}",
            f"addr add 10.123.45.1/30 dev {name}a",
            f"link set {name}a up",
            f"-n {name} addr add 10.123.45.2/30 dev {name}b",
            f"-n {name} link set {name}b up",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        knock = (
            "import socket, sys\n"
            "with socket.create_server(('10.123.45.2', 0)): pass\n"  # the cable is there
            "for port in map(int, sys.argv[1:]):\n"
            "    with socket.socket() as one:\n"
            "        one.settimeout(5)\n"
            "        print(one.connect_ex(('10.123.45.1', port)))\n"
        )
        scheduler = local.scheduler_address.rsplit(":", 1)[1]
        with socket.create_server(("10.123.45.1", 0)) as known:
            ports = (str(known.getsockname()[1]), str(port), scheduler)
            command = ["ip", "netns", "exec", name, sys.executable, "-c", knock, *ports]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert told[0] == "0"
        assert "0" not in told[1:]
    finally:
        subprocess.run(["ip", "link", "del", f"{name}a"], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=False)
