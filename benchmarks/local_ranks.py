"""Processes of one host that form a group, for benchmarks over several GPUs."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable

import torch
import torch.multiprocessing as mp


def run_ranks(
    work: Callable[[int, argparse.Namespace, int], None], args: argparse.Namespace, device: str = "cuda"
) -> None:
    """Runs ``work(rank, args, port)`` in ``args.ranks`` processes, which meet at the port."""
    if device == "cuda" and args.ranks > (count := torch.cuda.device_count()):
        sys.exit(f"--ranks {args.ranks} needs as many GPUs, and this machine has {count}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (args, port), nprocs=args.ranks)  # type: ignore[no-untyped-call]
