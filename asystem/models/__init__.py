"""Models: one decoder definition for training and decoding, Hugging Face folders and PEFT adapters in and out."""

from asystem.models.attention import PackedAttention
from asystem.models.collectives import by_rows, group_name
from asystem.models.decoder import Attend, Block, Decoder, init_weights
from asystem.models.frozen import FrozenLinear
from asystem.models.hf import check_folder, from_hf_state, load_model, save_model, to_hf_state
from asystem.models.lora import (
    LoraLinear,
    PlainWeight,
    add_lora,
    decoding_copy,
    merge,
    plain_weights,
    refresh_copy,
    whole,
)
from asystem.models.moe import Routed, Router
from asystem.models.moe_spec import MoESpec
from asystem.models.parallel import Shard, check_experts, check_parallel
from asystem.models.peft import adapter_state, check_lora, load_adapter, save_adapter
from asystem.models.pieces import Box, Held, Piece, local_piece
from asystem.models.quantized import QuantizedLinear, quantize
from asystem.models.spec import ModelSpec, RopeScaling, read_spec, spec_from_config, spec_from_hf, spec_to_hf
from asystem.models.weights import plain_parameters, weight_pieces, writing

__all__ = [
    "Attend",
    "Block",
    "Box",
    "Decoder",
    "MoESpec",
    "FrozenLinear",
    "Held",
    "LoraLinear",
    "ModelSpec",
    "PackedAttention",
    "Piece",
    "PlainWeight",
    "QuantizedLinear",
    "RopeScaling",
    "Routed",
    "Router",
    "Shard",
    "by_rows",
    "check_experts",
    "check_folder",
    "check_parallel",
    "adapter_state",
    "add_lora",
    "check_lora",
    "from_hf_state",
    "group_name",
    "init_weights",
    "load_adapter",
    "load_model",
    "local_piece",
    "merge",
    "decoding_copy",
    "plain_parameters",
    "plain_weights",
    "quantize",
    "read_spec",
    "refresh_copy",
    "save_adapter",
    "save_model",
    "spec_from_config",
    "spec_from_hf",
    "spec_to_hf",
    "to_hf_state",
    "weight_pieces",
    "whole",
    "writing",
]
