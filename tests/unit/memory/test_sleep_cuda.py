"""Sleep and wake on a GPU: the memory is really free, bits come back, and captured decode steps survive."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asystem.config import GenerationConfig
from asystem.errors import CapacityError
from asystem.generation import Engine, EngineRequest
from asystem.memory import AMem, MappedRegion, can_map
from asystem.models import Decoder, ModelSpec, init_weights
from asystem.types import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_mapping = pytest.mark.skipif(not can_map(), reason="needs the driver's virtual memory management")

SPEC = ModelSpec("qwen3", 512, 128, 256, 2, num_heads=4, num_kv_heads=2, head_dim=64, qk_norm=True, dtype="bfloat16")


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_states_leave_the_card_and_come_back_bit_for_bit() -> None:
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8, device=cuda()) for size in (200_000_001, 7, 64 << 20)]
    before = [tensor.cpu() for tensor in tensors]
    held = torch.cuda.memory_allocated()
    memory = AMem(cuda())
    memory.add("states", tensors)
    for _ in range(2):
        moved = memory.enter([])
        assert moved.slept == sum(t.numel() for t in before)
        assert torch.cuda.memory_allocated() <= held - moved.slept
        memory.enter(["states"])
        assert all(torch.equal(tensor.cpu(), bits) for tensor, bits in zip(tensors, before, strict=True))


def test_what_comes_takes_the_room_of_what_leaves() -> None:
    """Under a limit that has no room for both."""
    memory, size = AMem(cuda()), 256 << 20
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size * 3 // 2) / total)
    try:
        first = torch.full((size // 4,), 1.0, device=cuda())
        memory.add("first", [first])
        memory.enter([])
        second = torch.full((size // 4,), 2.0, device=cuda())
        memory.add("second", [second])
        memory.enter(["first"])
        assert float(first[::1000].sum()) == len(first[::1000]) and memory.held() == {"first": size, "second": 0}
        memory.enter(["second"])
        assert float(second[::1000].sum()) == 2 * len(second[::1000]) and memory.held()["first"] == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_mapping
def test_a_region_gives_its_pages_back_and_keeps_its_address() -> None:
    region = MappedRegion(256 << 20, cuda())
    region.tensor.fill_(7)
    address, free = region.tensor.data_ptr(), torch.cuda.mem_get_info()[0]
    memory = AMem(cuda())
    memory.add("kv", region)
    memory.enter([])
    assert not region.is_mapped and torch.cuda.mem_get_info()[0] >= free + (250 << 20)
    memory.enter(["kv"])
    assert region.tensor.data_ptr() == address and int(region.tensor.sum(dtype=torch.int64)) == 7 * (256 << 20)
    memory.enter([], drop=["kv"])
    memory.enter(["kv"])
    assert int(region.tensor.sum(dtype=torch.int64)) == 0
    memory.enter([], drop=["kv"])


@needs_mapping
def test_a_region_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"GiB are to be woken on cuda:\d+, and .* GiB are free: lower"):
        MappedRegion(2 * torch.cuda.mem_get_info()[1], cuda())


@needs_mapping
@pytest.mark.parametrize("mapped", [True, False])
def test_decoding_goes_on_where_its_pool_has_slept(mapped: bool) -> None:
    """With a region the very graphs go on; without, they are captured anew at the pool's new address."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("captured steps need compute capability 8.0")
    want, got = _tokens(sleeps=False, mapped=mapped), _tokens(sleeps=True, mapped=mapped)
    assert want[0] == got[0]
    assert got[1] is mapped, "the graphs stayed just where the addresses did"


def _tokens(*, sleeps: bool, mapped: bool) -> tuple[dict[int, list[int]], bool]:
    """Responses of a few rollouts, the pool asleep in the middle; and whether the graphs are those from before."""
    model = Decoder(SPEC).to(device=cuda(), dtype=torch.bfloat16)
    init_weights(model, 0, std=0.2)
    memory, regions = AMem(cuda()), []

    def room(nbytes: int) -> torch.Tensor:
        regions.append(MappedRegion(nbytes, cuda()))
        memory.add("kv", regions[-1])
        tensor: torch.Tensor = regions[-1].tensor
        return tensor

    config = GenerationConfig(max_running=4, kv_tokens=1024)
    engine = Engine(model, config, stop_ids=[], seed=0, max_length=64, memory=room if mapped else None)
    if not mapped:
        memory.add("kv", [engine.cache.data])
    prompt = np.arange(10, dtype=np.int32)
    engine.submit(EngineRequest(i, 0, 0, prompt, SamplingParams(24, ignore_eos=True)) for i in range(4))
    finished = engine.decode(max_steps=8).finished
    graphs = dict(engine.runner._graphs)  # type: ignore[attr-defined]
    spacers = []
    if sleeps:
        assert engine.rest(), "unfinished rollouts need their KV"
        assert memory.enter([]).slept > 0
        # What would else be given to the pool again.
        spacers.append(torch.empty(engine.cache.num_bytes, dtype=torch.uint8, device=cuda()))
        memory.enter(["kv"])
    finished += engine.decode().finished
    kept = all(engine.runner._graphs.get(key) is graph for key, graph in graphs.items())  # type: ignore[attr-defined]
    if mapped:
        memory.enter([], drop=["kv"])
    return {t.rollout: t.tokens.tolist() for t in finished}, kept
