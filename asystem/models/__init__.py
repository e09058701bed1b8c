"""Models: one decoder definition for training and decoding, Hugging Face folders in and out."""

from asystem.models.attention import PackedAttention
from asystem.models.decoder import Attend, Block, Decoder, init_weights
from asystem.models.hf import check_folder, from_hf_state, load_model, save_model, to_hf_state
from asystem.models.parallel import Shard, check_parallel
from asystem.models.spec import ModelSpec, RopeScaling, read_spec, spec_from_config, spec_from_hf, spec_to_hf
from asystem.models.weights import whole_shapes, write_weight

__all__ = [
    "Attend",
    "Block",
    "Decoder",
    "ModelSpec",
    "PackedAttention",
    "RopeScaling",
    "Shard",
    "check_folder",
    "check_parallel",
    "from_hf_state",
    "init_weights",
    "load_model",
    "read_spec",
    "save_model",
    "spec_from_config",
    "spec_from_hf",
    "spec_to_hf",
    "to_hf_state",
    "whole_shapes",
    "write_weight",
]
