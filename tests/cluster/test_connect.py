"""A cluster that somebody else started, with TLS and certificates of its own."""

import json
import threading

import pytest

from faulty import Cluster, settings
from stillframe.cluster.connect import executor
from stillframe.cluster.security import make_keys
from stillframe.settings import Settings
from stillframe.workflow.driver import run


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def cluster(keys, tmp_path_factory):
    names = {"ca-file": "ca.pem", "cert": "cert.pem", "key": "key.pem"}
    tls = [word for name, file in names.items() for word in (f"--tls-{name}", str(keys.folder / file))]
    with Cluster(tmp_path_factory.mktemp("cluster"), 1, "--protocol", "tls", *tls) as cluster:
        cluster.file.chmod(0o600)
        yield cluster


@pytest.mark.parametrize("by", ["file", "address"])
def test_is_joined_by_its_file_or_address_and_certificates(by, stored, cluster, keys, tmp_path, capsys):
    scheduler = str(cluster.file) if by == "file" else json.loads(cluster.file.read_text())["address"]
    on_it = settings(stored, tmp_path / "run", scheduler=scheduler, certificates=keys.folder)
    assert run(on_it).problems == []
    assert not list((tmp_path / "run").glob(".stillframe-*"))
    assert "has no TLS" not in capsys.readouterr().err


def connect(cluster, tmp_path, **given):
    asked = Settings(frames=tmp_path, out=tmp_path / "run", scheduler=str(cluster.file), **given)
    with executor(asked, None, threading.Event()) as workers:
        return workers


def test_is_not_joined_with_other_certificates(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("stillframe.cluster.connect._SCHEDULER_ANSWERS_WITHIN", 3)
    other = make_keys(tmp_path / "keys").folder
    with pytest.raises(ConnectionError, match="for one with TLS that --certificates names the folder of its keys"):
        connect(cluster, tmp_path, certificates=other)


def test_is_not_joined_without_certificates(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("stillframe.cluster.connect._SCHEDULER_ANSWERS_WITHIN", 3)
    with pytest.raises(ConnectionError, match="--certificates"):
        connect(cluster, tmp_path)


def test_is_not_joined_by_a_file_that_others_can_write(cluster, keys, tmp_path):
    cluster.file.chmod(0o666)
    with pytest.raises(PermissionError, match="could put a scheduler of theirs in its place"):
        connect(cluster, tmp_path, certificates=keys.folder)
    cluster.file.chmod(0o600)


def test_a_cluster_and_a_scheduler_are_one_too_many():
    with pytest.raises(ValueError, match="give one of them"):
        Settings(frames="frames.zarr", out="run", cluster="slurm", scheduler="tcp://127.0.0.1:1")
