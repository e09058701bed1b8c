"""Memory that several processes see."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from asystem.errors import ConfigError
from asystem.spmd.buffer import Buffer, SharedBuffer

READER = """
import pickle, sys
buffer = pickle.loads(sys.stdin.buffer.read({size}))
print(buffer.nbytes, buffer.array[:3].tolist(), buffer.array.flags.writeable, flush=True)
sys.stdin.buffer.read(1)
print(buffer.array[:3].tolist(), flush=True)
"""


def test_an_own_buffer_travels_as_a_copy() -> None:
    buffer = Buffer(4)
    buffer.array[:] = 7
    copy = pickle.loads(pickle.dumps(buffer))
    buffer.array[:] = 8
    assert copy.array.tolist() == [7, 7, 7, 7]


def test_another_process_sees_what_is_written_later() -> None:
    buffer = SharedBuffer(1 << 20)
    buffer.array[:3] = 1, 2, 3
    handle = pickle.dumps(buffer)
    assert len(handle) < 200
    command = [sys.executable, "-c", READER.format(size=len(handle))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        reader.stdin.write(handle)
        reader.stdin.flush()
        assert reader.stdout.readline().decode() == "1048576 [1, 2, 3] False\n"
        buffer.array[:3] = 4, 5, 6
        reader.stdin.write(b".")
        reader.stdin.close()
        assert reader.stdout.readline().decode() == "[4, 5, 6]\n"


def test_a_buffer_that_is_gone_is_refused_even_if_its_number_lives_on() -> None:
    buffer = SharedBuffer(64)
    handle, number = pickle.dumps(buffer), buffer._file
    array = buffer.array
    del buffer
    with pytest.raises(ConfigError, match=r"set weights\.transport=store"):
        pickle.loads(handle)
    other = os.memfd_create("other")
    os.dup2(other, number)
    try:
        with pytest.raises(ConfigError, match="it was freed"):
            pickle.loads(handle)
    finally:
        os.close(number)
        if other != number:
            os.close(other)
    array[:] = 1  # whoever mapped it keeps it
    assert np.all(array == 1)


def test_no_bytes_are_a_buffer_too() -> None:
    assert pickle.loads(pickle.dumps(SharedBuffer(0))).nbytes == 0


def test_a_map_is_kept_where_the_buffer_will_come_again() -> None:
    for lasting in (True, False):
        buffer = SharedBuffer(8, lasting=lasting)
        one, other = (pickle.loads(pickle.dumps(buffer)) for _ in range(2))
        assert (one is other) == lasting == one.lasting == buffer.lasting
        buffer.array[:] = 5
        assert other.array.tolist() == [5] * 8
