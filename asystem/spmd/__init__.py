"""Worker groups: SPMD programs on many ranks behind the type of one worker. The only package that imports Ray."""

from asystem.spmd import store
from asystem.spmd.bootstrap import bootstrap
from asystem.spmd.buffer import Buffer, DeviceBuffer, SharedBuffer
from asystem.spmd.group import replicas, spawn
from asystem.spmd.remote import Collect, Dispatch, Worker, remote
from asystem.spmd.runtime import Runtime, make_runtime

__all__ = [
    "Buffer",
    "Collect",
    "DeviceBuffer",
    "Dispatch",
    "Runtime",
    "SharedBuffer",
    "Worker",
    "bootstrap",
    "make_runtime",
    "remote",
    "replicas",
    "spawn",
    "store",
]
