"""Weights between two processes on GPUs: over CUDA IPC on one GPU and between two, over NCCL between two."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from asystem.config import LoraConfig, Transport
from asystem.errors import PublicationError
from asystem.models import Box, Decoder, ModelSpec, Shard, add_lora, init_weights, merge, quantize
from asystem.state import Inbox, Outbox, StreamInbox, StreamOutbox, Terms
from asystem.state.checksum import MODULUS, Checksums, Part, checksum, settled
from asystem.state.payload import copy_all

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
SPEC = ModelSpec("qwen3", 523, 64, 96, 2, 4, 2, 16, qk_norm=True, tie_embeddings=True)
TURNS, DONE = 3, b"done"


def model_at(turn: int) -> Decoder:
    model = Decoder(SPEC)
    init_weights(model, turn)
    return model


def processes(sender: Callable[..., None], receiver: Callable[..., None], gpus: tuple[str, str], *args: Any) -> None:
    """Runs both, each of which sees one GPU alone; they talk over a pipe."""
    context, ends = mp.get_context("spawn"), mp.Pipe()
    before, started = os.environ.get("CUDA_VISIBLE_DEVICES"), []
    try:
        for act, end, gpu in zip((sender, receiver), ends, gpus, strict=True):
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu if before is None else before.split(",")[int(gpu)]
            started.append(context.Process(target=act, args=(end, *args)))
            started[-1].start()
            end.close()  # so that the other side notices when this one ends
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES") if before is None else os.environ.update(CUDA_VISIBLE_DEVICES=before)
    for process in started:
        process.join(150)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0, 0], "a process failed, see its output, or hung (None)"


def _send(pipe: Connection, lora: bool) -> None:
    model = model_at(0).cuda()
    if lora:
        add_lora(model, LoraConfig(rank=2, targets=["q_proj", "down_proj"]), seed=0)
    outbox = Outbox(model, torch.bfloat16, transport=Transport.ipc)
    for turn in range(TURNS):
        with torch.no_grad():
            if lora:
                model.get_parameter("layers.1.mlp.down_proj.lora_B").fill_(turn)
            else:
                for parameter, new in zip(model.parameters(), model_at(turn).parameters(), strict=True):
                    parameter.copy_(new)
            want = {name: tensor.bfloat16().cpu().view(torch.int16).numpy() for name, tensor in merge(model).items()}
        pipe.send_bytes(pickle.dumps(outbox.write()))
        pipe.send_bytes(pickle.dumps(want))
        assert pipe.recv_bytes() == DONE
    pipe.recv_bytes()  # the buffer stays until the other has checked it


def _receive(pipe: Connection, lora: bool) -> None:
    from asystem.spmd.buffer import _kept_device

    targets: list[Decoder] = [model_at(9).cuda().bfloat16(), Shard(1, 2).cut(model_at(9)).cuda().bfloat16()]
    targets.append(quantize(model_at(9).cuda().bfloat16(), torch.int8))
    inboxes, views = [Inbox(target) for target in targets], []
    for turn in range(TURNS):
        payload = pickle.loads(pipe.recv_bytes())
        want = {k: torch.from_numpy(v).view(torch.bfloat16) for k, v in pickle.loads(pipe.recv_bytes()).items()}
        for inbox in inboxes:
            inbox.read([payload])
        assert (payload.frozen is not None) == (lora and turn == 0)
        whole = model_at(9).bfloat16()
        whole.load_state_dict(want, strict=False)
        for name, parameter in targets[0].named_parameters():
            assert torch.equal(parameter.cpu(), want[name]), (turn, name)
        for name, parameter in Shard(1, 2).cut(whole).named_parameters():
            assert torch.equal(targets[1].get_parameter(name).cpu(), parameter.bfloat16()), (turn, name)
        linear = targets[2].get_submodule("layers.1.mlp.down_proj")
        off = (linear.weight.float() * linear.channel_scale[:, None]).cpu() - want["layers.1.mlp.down_proj.weight"]  # type: ignore[operator, index]  # fmt: skip
        assert float(off.abs().max()) <= float(linear.channel_scale.max()) / 2 * 1.01  # type: ignore[operator, union-attr]
        views.append(inboxes[0]._ready.pairs)
        pipe.send_bytes(DONE)
    assert views[-1] and views[-1] is views[-2], "the second look into the buffer is the last"
    assert _kept_device.cache_info().misses == 1, "mapped once; what is frozen is not kept"
    pipe.send_bytes(DONE)


@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_on_one_gpu_publish_over_ipc(lora: bool) -> None:
    processes(_send, _receive, ("0", "0"), lora)


@two_gpus
def test_two_gpus_that_do_not_see_each_other_publish_over_ipc() -> None:
    processes(_send, _receive, ("0", "1"), False)


def _terms() -> Terms:
    return Terms(1, 1, torch.device("cuda", 0), seconds=60.0, bucket_bytes=65536)


def _stream(pipe: Connection) -> None:
    model = model_at(0).cuda()
    outbox = StreamOutbox(model, torch.bfloat16, 1, 0, _terms())
    for turn in range(TURNS):
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), model_at(turn).parameters(), strict=True):
                parameter.copy_(new)
        pipe.send_bytes(pickle.dumps(outbox.write()))
        assert pipe.recv_bytes() == DONE
    outbox.settle()


def _take_stream(pipe: Connection) -> None:
    target = model_at(9).cuda().bfloat16()
    inbox = StreamInbox(target, 0, _terms())
    for turn in range(TURNS):
        inbox.read([pickle.loads(pipe.recv_bytes())])
        for name, new in model_at(turn).named_parameters():
            assert torch.equal(target.get_parameter(name).cpu(), new.bfloat16()), (turn, name)
        pipe.send_bytes(DONE)


@two_gpus
def test_two_gpus_publish_over_nccl() -> None:
    processes(_stream, _take_stream, ("0", "1"))


def _stream_to_nobody(pipe: Connection) -> None:
    """What happens to training when generation is lost on the way: its thread gives up, its GPU goes on."""
    terms = Terms(1, 1, torch.device("cuda", 0), seconds=8.0, bucket_bytes=65536)
    model = model_at(0).cuda()
    outbox = StreamOutbox(model, torch.bfloat16, 1, 0, terms)
    pipe.send_bytes(pickle.dumps(outbox.write()))
    assert pipe.recv_bytes() == DONE
    pipe.send_bytes(pickle.dumps(outbox.write()))
    with pytest.raises(Exception, match=r"trainers rank 0|generators rank 0"):
        _publish_once_more(outbox)
    assert torch.equal(model.embed.weight.cpu(), model_at(0).embed.weight)
    torch.cuda.synchronize()


def _publish_once_more(outbox: StreamOutbox) -> None:
    outbox.settle()  # may succeed: NCCL takes small sends into buffers of its own
    outbox.write()
    outbox.settle()


def _leave_in_the_middle(pipe: Connection) -> None:
    from asystem.state import receiving

    terms = Terms(1, 1, torch.device("cuda", 0), seconds=8.0, bucket_bytes=65536)
    inbox = StreamInbox(model_at(9).cuda().bfloat16(), 0, terms)
    inbox.read([pickle.loads(pipe.recv_bytes())])
    pipe.send_bytes(DONE)
    receiving._Arriving.unpack = lambda *_: os._exit(0)  # type: ignore[method-assign]
    inbox.read([pickle.loads(pipe.recv_bytes())])


@two_gpus
def test_training_outlives_a_generator_that_is_lost_in_the_middle() -> None:
    processes(_stream_to_nobody, _leave_in_the_middle, ("0", "1"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("shape", [(1,), (7,), (300, 1024), (37, 1000), (5, 33, 129), (4097, 130)])
def test_checksums_on_a_gpu_are_those_of_a_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = torch.randint(-100, 100, shape).to(dtype)
    box = Box.whole(shape)
    assert checksum(block.cuda(), box, shape) == checksum(block, box, shape)
    if len(shape) > 1 and shape[-1] > 9:  # a part whose rows do not follow each other in memory
        part = Box((0,) * len(shape), (*shape[:-1], 9))
        rest = Box((*(0 for _ in shape[:-1]), 9), shape)
        sums = [checksum(box.of(block.cuda(), (0,) * len(shape)), box, shape) for box in (part, rest)]
        assert sum(sums) % MODULUS == checksum(block, box, shape)


def test_blocks_may_lie_on_the_host_and_on_a_gpu() -> None:
    blocks = [torch.randn(33, 65) for _ in range(6)]
    there = [block.cuda() if index % 2 else block.pin_memory() for index, block in enumerate(blocks)]
    parts: list[Part] = [(block, Box.whole((33, 65)), (33, 65)) for block in there]
    prepared = Checksums(parts)
    for _ in range(2):
        wanted = [checksum(block.cpu(), *rest) for block, *rest in parts]
        assert settled([prepared.take()]) == wanted and prepared.take().is_cuda
        there[1].mul_(2)
        there[2].mul_(2)
    targets = [torch.zeros(33, 65, device=device) for device in ("cuda", "cuda", "cpu", "cpu", "cuda", "cuda")]
    copy_all(list(zip(targets, there, strict=True)))
    assert all(torch.equal(target.cpu(), block.cpu()) for target, block in zip(targets, there, strict=True))


@pytest.mark.parametrize("transport", [Transport.ipc, Transport.shared_memory])
def test_streamed_weights_are_published_from_the_hosts_memory_and_verified(transport: Transport) -> None:
    source, target = model_at(0).cuda(), model_at(9).cuda()
    for parameter in source.layers.parameters():
        parameter.data = parameter.data.cpu().pin_memory()
    outbox, inbox = Outbox(source, transport=transport), Inbox(target)
    for _ in range(TURNS):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(2)
        payload = outbox.write()
        inbox.read([payload])
        for name, parameter in source.named_parameters():
            assert torch.equal(target.get_parameter(name).cpu(), parameter.cpu()), name
    assert next(source.layers.parameters()).is_pinned()
    payload.places[3].of(payload.buffer.flat()).view(-1)[0] += 1
    with pytest.raises(PublicationError, match="changed on its way"):
        inbox.read([payload])
