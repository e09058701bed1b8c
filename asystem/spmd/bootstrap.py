"""From torchrun's one process a node to one Ray cluster, with the controller on node 0.

    node 0   ray head ──address, token──▶ store ◀── wait ── node k ▶ ray node ──joined──▶ store
             controller runs; every node beats once a second, and watches the others' beats
             ──done or failed──▶ store ──▶ node k stops its Ray processes, and ends likewise

The store is the one that torchrun's rendezvous has made. When any node's process dies, all nodes end with an error.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from asystem.config import RuntimeConfig
from asystem.errors import ConfigError, WorkerError, WorkerTimeout
from asystem.spmd.host import NODE_VARIABLE
from asystem.spmd.runtimes.cluster import (
    NODE_RESOURCE,
    end_on_sigterm,
    new_temp_dir,
    remove_temp_dir,
    token_environment,
)

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_SECONDS = 1.0
DONE, FAILED = "done", "failed"


@contextmanager
def bootstrap(config: RuntimeConfig | None = None, *, lost_seconds: float = 20.0) -> Iterator[bool]:
    """Yields whether this process is the controller; on other nodes, it yields when the controller is through.

    Without torchrun, or with one node, this process is the controller and nothing else happens. Otherwise the
    controller finds RAY_ADDRESS set, so that `make_runtime` joins the cluster of all nodes.

    Args:
        lost_seconds: without a sign of life, after which a node counts as lost.

    Raises:
        ConfigError: torchrun has started several processes on a node.
        WorkerTimeout: a node did not come within `runtime.start_seconds`.
        WorkerError: a node was lost, or the controller failed.
    """
    nodes = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if nodes == 1:
        yield True
        return
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ConfigError("torchrun has started several processes a node: use --nproc-per-node=1, ranks come from Ray")
    end_on_sigterm()
    node = _Node(int(os.environ["RANK"]), nodes, config or RuntimeConfig(), lost_seconds)
    try:
        if node.rank == 0:
            with node.controlling():
                yield True
        else:
            node.follow()
            yield False
    finally:
        node.stop_ray()


class _Node:
    """One node of the cluster to be, and its Ray processes."""

    def __init__(self, rank: int, num_nodes: int, config: RuntimeConfig, lost_seconds: float) -> None:
        self.rank, self.num_nodes, self.config, self.lost_seconds = rank, num_nodes, config, lost_seconds
        self.store = _rendezvous(config.start_seconds)
        self.temp_dir = new_temp_dir()
        self._ray: subprocess.Popen[bytes] | None = None
        self._beats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}  # by peer: its last beat, and when it was new here

    @contextmanager
    def controlling(self) -> Iterator[None]:
        """Node 0: the cluster stands inside of it; leaving it tells the others how the run has ended."""
        outcome = FAILED
        try:
            self._start_head()
            with self._watching() as lost:
                try:
                    yield
                except KeyboardInterrupt:
                    if not lost:
                        raise
            if lost:
                raise lost[0] from None
            outcome = DONE
        finally:
            self._dismiss(outcome)

    def follow(self) -> None:
        """Other nodes: join, and stay until node 0 is through."""
        with self._store_lives():
            self._join()
            self._begin_to_watch()
            while not self.store.check(["outcome"]):
                self._beat()
                time.sleep(BEAT_SECONDS)
            outcome = self.store.get("outcome").decode()
            self.store.set(f"left/{self.rank}", "")
        if outcome == FAILED:
            raise self._error(0, "run", "the controller failed; its output says why")

    def stop_ray(self) -> None:
        """Ends this node's Ray processes, and no others on the machine, as ``ray stop`` would."""
        if self._ray is not None:
            self._ray.terminate()  # it ends its children in order; told all at once, they wait for each other
            with suppress(subprocess.TimeoutExpired):
                self._ray.wait(timeout=15)
            with suppress(ProcessLookupError):
                os.killpg(self._ray.pid, signal.SIGKILL)
            self._ray.wait()
        remove_temp_dir(self.temp_dir)

    def _start_head(self) -> None:
        address, token = _own_address(os.environ["MASTER_ADDR"]), secrets.token_hex(32)
        port = _free_port(address)
        os.environ.update(token_environment(token))
        self._start_ray(["--head", f"--port={port}", f"--node-ip-address={address}", "--include-dashboard=false"])
        self.store.set("joined/0", socket.gethostname())
        self.store.set("cluster", json.dumps({"address": f"{address}:{port}", "token": token}))
        os.environ["RAY_ADDRESS"] = f"{address}:{port}"
        for peer in range(1, self.num_nodes):
            self._await(f"joined/{peer}", peer, "join")
        self._begin_to_watch()

    def _join(self) -> None:
        cluster = json.loads(self._await("cluster", 0, "start"))
        os.environ.update(token_environment(cluster["token"]))
        host, port = cluster["address"].rsplit(":", 1)
        own = _address_towards(host, int(port))
        self._start_ray([f"--address={cluster['address']}", f"--node-ip-address={own}"])
        self.store.set(f"joined/{self.rank}", socket.gethostname())

    def _start_ray(self, options: list[str]) -> None:
        log = self.temp_dir / "start.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options]
        command += [f"--temp-dir={self.temp_dir}", f"--object-store-memory={self.config.object_store_bytes}"]
        command += _random_ports()
        command += [f"--resources={json.dumps({f'{NODE_RESOURCE}{self.rank}': 1})}"]
        with log.open("wb") as output:
            self._ray = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
                env=os.environ | {NODE_VARIABLE: str(self.rank)},
            )
        self._wait_until(lambda: b"Ray runtime started" in log.read_bytes(), self.rank, "start", log)

    def _await(self, key: str, peer: int, phase: str) -> bytes:
        self._wait_until(lambda: bool(self.store.check([key])), peer, phase)
        return bytes(self.store.get(key))

    def _wait_until(self, condition: Callable[[], bool], peer: int, phase: str, log: Path | None = None) -> None:
        limit = self.config.start_seconds
        end = time.monotonic() + limit
        while not condition():
            if self._ray is not None and self._ray.poll() is not None:
                raise self._error(self.rank, phase, f"Ray ended with code {self._ray.returncode}{_tail(log)}")
            if peer != self.rank and peer == 0 and self.store.check(["outcome"]):
                raise self._error(0, phase, "it failed; its output says why")
            if time.monotonic() > end:
                reason = f"no sign within runtime.start_seconds={limit:g} s{_tail(log)}"
                raise WorkerTimeout("nodes", peer, _host(self.store, peer), phase, reason)
            time.sleep(0.1)

    @contextmanager
    def _watching(self) -> Iterator[list[WorkerError]]:
        """A thread beats and watches; it interrupts the main thread when a node is lost."""
        lost: list[WorkerError] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(BEAT_SECONDS):
                try:
                    with self._store_lives():
                        self._beat()
                except WorkerError as error:
                    lost.append(error)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return

        thread = threading.Thread(target=watch, name="nodes", daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            stop.set()
            thread.join()

    def _begin_to_watch(self) -> None:
        peers = range(1, self.num_nodes) if self.rank == 0 else [0]
        self._seen = {peer: (b"", time.monotonic()) for peer in peers}

    def _beat(self) -> None:
        """One sign of life, and a look at those of the peers.

        Raises:
            WorkerError: a peer has given none for too long, has said that it ends, or Ray has ended here.
        """
        if self._ray is not None and self._ray.poll() is not None:
            self.store.set(f"lost/{self.rank}", "its Ray processes ended")
            raise self._error(self.rank, "run", f"its Ray processes ended with code {self._ray.returncode}")
        self._beats += 1
        self.store.set(f"beat/{self.rank}", str(self._beats))
        for peer, (beat, when) in self._seen.items():
            if self.store.check([f"lost/{peer}"]):
                raise self._error(peer, "run", self.store.get(f"lost/{peer}").decode())
            now = self.store.get(f"beat/{peer}") if self.store.check([f"beat/{peer}"]) else b""
            if now != beat:
                self._seen[peer] = (now, time.monotonic())
            elif time.monotonic() - when > (limit := self.lost_seconds if beat else self.config.start_seconds):
                raise self._error(peer, "run", f"no sign of life for {limit:g} s")

    @contextmanager
    def _store_lives(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's, when the server of the store is gone
            raise self._error(0, "run", "torchrun's store is gone: its process on node 0 has ended") from error

    def _dismiss(self, outcome: str) -> None:
        """Tells the other nodes that the run is over, and gives them time to read it before the store is gone."""
        self.store.set("outcome", outcome)
        end = time.monotonic() + 5 * BEAT_SECONDS
        peers = [f"left/{peer}" for peer in range(1, self.num_nodes) if self.store.check([f"joined/{peer}"])]
        while time.monotonic() < end and not all(self.store.check([peer]) for peer in peers):
            time.sleep(0.1)

    def _error(self, peer: int, phase: str, reason: str) -> WorkerError:
        return WorkerError("nodes", peer, _host(self.store, peer), phase, reason)


def _rendezvous(seconds: float) -> Store:
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    return PrefixStore("asystem", store)


def _host(store: Store, peer: int) -> str:
    try:
        return store.get(f"joined/{peer}").decode() if store.check([f"joined/{peer}"]) else f"node {peer}"
    except RuntimeError:
        return f"node {peer}"


def _own_address(master: str) -> str:
    """The address of node 0 under which torchrun's other nodes have found it."""
    address = socket.gethostbyname(master)
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:  # behind a translated address
            return socket.gethostbyname(socket.gethostname())
    return address


def _address_towards(host: str, port: int) -> str:
    """The address of this machine on the network where ``host`` is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return str(probe.getsockname()[0])


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _random_ports() -> list[str]:
    """So that several nodes fit on one machine."""
    options = ("min-worker-port", "max-worker-port", "node-manager-port", "object-manager-port")
    return [f"--{option}=0" for option in (*options, "dashboard-agent-listen-port")]


def _die_with_parent() -> Callable[[], None] | None:
    """Lets Linux end Ray when this process is killed without a chance to clean up."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return lambda: library.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _tail(log: Path | None) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log is not None and log.exists() else []
    return f": {' | '.join(lines[-5:])}" if lines else ""
