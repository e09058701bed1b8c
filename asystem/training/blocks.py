"""What training changes of a decoder's blocks: activations computed again (Chen et al. 2016), and compilation.

none        every activation of the forward pass waits for the backward pass
selective   q, k, v and what attention makes of them wait; the parts before and after it are computed again
full        the block's input waits; the whole block is computed again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from asystem.config import Compile, Recompute, TrainingConfig
from asystem.models import Block, Decoder


def prepare_blocks(model: Decoder, cfg: TrainingConfig, device: torch.device) -> None:
    """Compiles and wraps each block as configured, in place; adapters stand already, shards not yet."""
    compiled = cfg.compile is Compile.always or (cfg.compile is Compile.auto and device.type == "cuda")
    if compiled:
        _compile_for_little_host_time()
    wrapped = {Recompute.none: (), Recompute.selective: ("project", "finish"), Recompute.full: ("forward",)}
    for block in model.layers:
        assert isinstance(block, Block)
        if compiled:
            block.compile_parts(dynamic=True)  # lengths differ from batch to batch: one graph for all
        for name in wrapped[cfg.recompute]:
            setattr(block, name, _recomputed(getattr(block, name), keep_rng=cfg.lora.dropout > 0))


def _compile_for_little_host_time() -> None:
    """Settings of the process, for what is compiled from here on."""
    import torch._inductor.config as inductor

    # Dynamic lengths make floats dynamic too: LoRA's scales and norms' epsilons, which were made tensors at each call.
    torch._dynamo.config.specialize_float = True
    inductor.size_asserts = False  # of everything that a graph computes, at each call


def _recomputed(function: Callable[..., Any], *, keep_rng: bool) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=keep_rng)

    return call
