import os
import signal
import tempfile

import pytest

from asystem.errors import ConfigError
from asystem.spmd.runtimes import cluster


def test_our_own_cluster_gets_a_secret_token_and_a_foreign_one_keeps_its_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(cluster.sys.modules, "ray", raising=False)
    cluster.prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    cluster.prepare_environment()
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_long_temporary_folder_would_not_fit_rays_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("x" * 60)))
    path = cluster.new_temp_dir()
    try:
        assert str(path).startswith("/tmp/asystem-")
        assert len(str(path)) <= 36
    finally:
        cluster.remove_temp_dir(path)
    assert not path.exists()


def test_nodes_are_told_apart_by_our_resource_first() -> None:
    assert cluster.identity({"CPU": 2, "node:10.0.0.1": 1, "asystem_node_3": 1}) == "asystem_node_3"
    assert cluster.identity({"CPU": 2, "node:__internal_head__": 1, "node:10.0.0.1": 1}) == "node:10.0.0.1"
    assert cluster.identity({"CPU": 2}) is None


def test_groups_are_spread_over_the_emptiest_node_that_fits() -> None:
    gpus = {"a": 4.0, "b": 8.0}
    assert cluster.choose_node(gpus, {}, 4) == "a"
    assert cluster.choose_node(gpus, {"a": [4]}, 4) == "b"
    assert cluster.choose_node(gpus, {"a": [0], "b": [0, 0]}, 4) == "a"
    assert cluster.choose_node(gpus, {"b": [0, 0, 0]}, 8) == "b"
    assert cluster.choose_node(gpus, {"a": [1], "b": [4, 1]}, 4) is None
    assert cluster.choose_node({"a": 0, "b": 0}, {"a": [0]}, 0) == "b"


def test_gpus_are_given_out_until_there_are_none() -> None:
    assert cluster.gpus_per_rank("trainers", 4, 1, total=8, taken=4) == 1
    assert cluster.gpus_per_rank("trainers", 4, 0.5, total=2, taken=0) == 0.5
    assert cluster.gpus_per_rank("trainers", 4, 1, total=0, taken=0) == 0  # a cluster of CPUs
    with pytest.raises(ConfigError, match=r"trainers needs 4 GPUs \(4 ranks of 1\), and 2 of 8 are free: use fewer"):
        cluster.gpus_per_rank("trainers", 4, 1, total=8, taken=6)


def test_sigterm_ends_a_run_as_ctrl_c_does() -> None:
    terminate, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cluster.end_on_sigterm()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells start jobs in the background
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)
