"""Weights in and out of Hugging Face folders: config.json and safetensors, one file or sharded with an index.

`layout` is the one table that says where each Hugging Face tensor lies in the decoder's fused ones; reading, writing
and both state translations go by it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asystem.data.tokenizer import Tokenizer
from asystem.errors import ModelError
from asystem.models.decoder import Decoder
from asystem.models.moe_spec import MoESpec
from asystem.models.parallel import Shard
from asystem.models.pieces import Box
from asystem.models.quantized import quantize
from asystem.models.spec import ModelSpec, read_spec, spec_to_hf
from asystem.models.weights import matrix_of, write_rows

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TIED_HEAD = "lm_head.weight"
_STORED_DTYPES = {"F32", "BF16", "F16", "F64"}
_OUR_FILES = ("model*.safetensors", INDEX, "*config.json", "tokenizer.json", "chat_template.jinja")
_REMEDY = "fetch or export the folder again"


@dataclass(frozen=True)
class Place:
    """A Hugging Face tensor of ``shape`` is the rows from ``start`` on of the decoder's tensor ``name``, or of the
    matrix of one ``expert`` in it."""

    name: str
    start: int
    shape: tuple[int, ...]
    expert: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The rows themselves, as a view."""
        return matrix_of(tensor, self.expert).narrow(0, self.start, self.shape[0])


def layout(spec: ModelSpec) -> dict[str, Place]:
    """Hugging Face name -> its place in the decoder's parameters, for every tensor that a folder must hold."""
    table = {
        embedding_name(spec): Place("embed.weight", 0, (spec.vocab_size, spec.hidden_size)),
        "model.norm.weight": Place("norm.weight", 0, (spec.hidden_size,)),
    }
    if not spec.tie_embeddings:
        table[TIED_HEAD] = Place("head.weight", 0, (spec.vocab_size, spec.hidden_size))
    for layer in range(spec.num_layers):
        for theirs, place in _layer_layout(spec, layer):
            table[f"model.layers.{layer}.{theirs}"] = replace(place, name=f"layers.{layer}.{place.name}")
    return table


def embedding_name(spec: ModelSpec) -> str:
    return "model.word_embeddings.weight" if spec.family == "bailing_moe_v2" else "model.embed_tokens.weight"


def _layer_layout(spec: ModelSpec, layer: int) -> Iterator[tuple[str, Place]]:
    yield "input_layernorm.weight", Place("attn_norm.weight", 0, (spec.hidden_size,))
    yield "post_attention_layernorm.weight", Place("mlp_norm.weight", 0, (spec.hidden_size,))
    yield from _ling_attention(spec) if spec.family == "bailing_moe_v2" else _attention(spec)
    if spec.moe is not None and spec.moe.has_experts(layer):
        yield from _moe(spec.hidden_size, spec.moe)
    else:
        yield from _mlp("mlp.", "mlp.", spec.intermediate_size, spec.hidden_size)


def _attention(spec: ModelSpec) -> Iterator[tuple[str, Place]]:
    hidden, q, kv = spec.hidden_size, spec.q_size, spec.kv_size
    for name, start, rows in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
        yield f"self_attn.{name}_proj.weight", Place("attn.qkv_proj.weight", start, (rows, hidden))
        if spec.qkv_bias:
            yield f"self_attn.{name}_proj.bias", Place("attn.qkv_proj.bias", start, (rows,))
    yield "self_attn.o_proj.weight", Place("attn.o_proj.weight", 0, (hidden, q))
    if spec.qk_norm:
        for name, size in zip("qk", spec.qk_norm_sizes, strict=True):
            yield f"self_attn.{name}_norm.weight", Place(f"attn.{name}_norm.weight", 0, (size,))


def _ling_attention(spec: ModelSpec) -> Iterator[tuple[str, Place]]:
    hidden, q, kv = spec.hidden_size, spec.q_size, spec.kv_size
    yield "attention.query_key_value.weight", Place("attn.qkv_proj.weight", 0, (q + 2 * kv, hidden))
    yield "attention.dense.weight", Place("attn.o_proj.weight", 0, (hidden, q))
    if spec.qk_norm:
        yield "attention.query_layernorm.weight", Place("attn.q_norm.weight", 0, (spec.head_dim,))
        yield "attention.key_layernorm.weight", Place("attn.k_norm.weight", 0, (spec.head_dim,))


def _moe(hidden: int, moe: MoESpec) -> Iterator[tuple[str, Place]]:
    yield "mlp.gate.weight", Place("mlp.router.weight", 0, (moe.num_experts, hidden))
    if moe.has_bias:
        yield "mlp.gate.expert_bias", Place("mlp.router.bias", 0, (moe.num_experts,))
    inner = moe.intermediate_size
    for expert in range(moe.num_experts):
        theirs = f"mlp.experts.{expert}"
        yield f"{theirs}.gate_proj.weight", Place("mlp.experts.gate_up", 0, (inner, hidden), expert)
        yield f"{theirs}.up_proj.weight", Place("mlp.experts.gate_up", inner, (inner, hidden), expert)
        yield f"{theirs}.down_proj.weight", Place("mlp.experts.down", 0, (hidden, inner), expert)
    if moe.shared_size:
        yield from _mlp("mlp.shared_experts.", "mlp.shared.", moe.shared_size, hidden)


def _mlp(theirs: str, ours: str, inner: int, hidden: int) -> Iterator[tuple[str, Place]]:
    yield f"{theirs}gate_proj.weight", Place(f"{ours}gate_up_proj.weight", 0, (inner, hidden))
    yield f"{theirs}up_proj.weight", Place(f"{ours}gate_up_proj.weight", inner, (inner, hidden))
    yield f"{theirs}down_proj.weight", Place(f"{ours}down_proj.weight", 0, (hidden, inner))


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The decoder's own parameter names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in layout(spec).values():  # the last rows of the last expert come last
        shape = (place.start + place.shape[0], *place.shape[1:])
        shapes[place.name] = shape if place.expert is None else (place.expert + 1, *shape)
    return shapes


def to_hf_state(spec: ModelSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state under Hugging Face's names: views, nothing is copied.

    Raises:
        ModelError: a missing, extra or misshapen tensor.
    """
    _check_shapes("state", {name: tuple(t.shape) for name, t in state.items()}, parameter_shapes(spec))
    return {theirs: place.of(state[place.name]) for theirs, place in layout(spec).items()}


def from_hf_state(spec: ModelSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's state under the decoder's names, joined into fused tensors; the inverse of `to_hf_state`.

    Raises:
        ModelError: a missing, extra or misshapen tensor.
    """
    table = layout(spec)
    state = {name: tensor for name, tensor in state.items() if not _ignorable(name)}
    if spec.tie_embeddings and TIED_HEAD in state:
        state = dict(state)
        _check_tied(state.pop(TIED_HEAD), state.get(embedding_name(spec)), "state")
    _check_shapes("state", {name: tuple(t.shape) for name, t in state.items()}, _their_shapes(table))
    shapes = parameter_shapes(spec)
    ours: dict[str, Tensor] = {}
    for theirs, place in table.items():
        if place.name not in ours:
            ours[place.name] = state[theirs].new_empty(shapes[place.name])
        place.of(ours[place.name]).copy_(state[theirs])
    return ours


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    part: Shard | None = None,
    quantized: torch.dtype | None = None,
) -> Decoder:
    """The model in a Hugging Face folder, one tensor at a time, so that weights are never held twice.

    All headers are checked before memory is taken.

    Args:
        part: read one rank's part of each tensor alone; None = the whole model.
        quantized: the 8-bit dtype of the blocks' matrices, which are never held in another one; None = `dtype`.

    Raises:
        ModelError: a missing, truncated or corrupt file, a missing, extra or misshapen tensor, an unsupported model.
        ConfigError: the model cannot be cut into such parts.
    """
    spec, found = check_folder(path)
    with torch.device("meta"):
        model = (Decoder(spec) if part is None else part.decoder(spec)).to(dtype)
        if quantized is not None:
            quantize(model, quantized)
    model.to_empty(device=device)
    table = layout(model.spec)
    for file in dict.fromkeys(found.values()):
        with _opened(file) as shard:
            for name in shard.keys() & table.keys():
                place, expert = table[name], table[name].expert
                if expert is not None and part is not None and (expert := part.expert(model.spec, expert)) is None:
                    continue
                write_rows(model, place.name, place.start, _read(shard, name, place, model), expert)
    if spec.tie_embeddings and TIED_HEAD in found:
        with _opened(found[TIED_HEAD]) as shard:
            embedding = model.embed.weight.detach().cpu()
            _check_tied(shard.get_tensor(TIED_HEAD).to(dtype), embedding, str(found[TIED_HEAD]))
    return model


def _read(file: Any, name: str, place: Place, model: Decoder) -> Tensor:
    """A stored tensor, or of one that is larger than its place the rank's rows or columns."""
    stored, part = file.get_slice(name), model.shard
    whole = tuple(stored.get_shape())
    if part is None or whole == place.shape:
        tensor: Tensor = stored[:]
        return tensor
    pieces = part.pieces(model.spec, place.name, whole) if place.expert is None else []
    if sum(piece.box.size for piece in pieces) == prod(place.shape):  # fused as here: Ling's query_key_value
        return torch.cat([stored[_ranges(piece.box)] for piece in pieces])
    first = [0 if n == of else part.rank * n for n, of in zip(place.shape, whole, strict=True)]
    tensor = stored[_ranges(Box(tuple(first), tuple(a + n for a, n in zip(first, place.shape, strict=True))))]
    return tensor


def _ranges(box: Box) -> tuple[slice, ...]:
    return tuple(map(slice, box.start, box.stop))


def check_folder(path: str | Path) -> tuple[ModelSpec, dict[str, Path]]:
    """Reads the config and the headers of all weight files, no weights: the spec, and which file holds which tensor.

    Raises:
        ModelError: as `load_model`.
    """
    spec = read_spec(path)
    table = layout(spec)
    found: dict[str, Path] = {}
    for file, names in _weight_files(Path(path)).items():
        found |= dict.fromkeys(_check_header(file, names, spec, table), file)
    _check_names(str(path), found.keys(), table.keys() | ({TIED_HEAD} & found.keys() if spec.tie_embeddings else set()))
    return spec, found


def save_model(
    model: nn.Module | Mapping[str, Tensor],
    spec: ModelSpec,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes a folder that `load_model` and transformers read.

    The folder appears whole: it is written beside ``path`` and renamed. A model folder already there is replaced.

    Args:
        model: a decoder or its full state dict (whole tensors, not shards of a distributed model).
        max_shard_bytes: above it, weights are split over files with an index.

    Raises:
        ModelError: a missing, extra or misshapen tensor, or ``path`` holds files that are no model's.
    """
    path = Path(path)
    _refuse_foreign_files(path)
    state = to_hf_state(spec, model.state_dict() if isinstance(model, nn.Module) else model)
    dtype = str(state["model.norm.weight"].dtype).removeprefix("torch.")
    config = spec_to_hf(replace(spec, dtype=dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        if tokenizer is not None:
            tokenizer.save(temporary)
            config |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "bos_token_id": None}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_shards(state, temporary, max_shard_bytes)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are closed to everybody else
        _move_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(state: dict[str, Tensor], folder: Path, max_bytes: int) -> None:
    shards: list[list[str]] = []
    room = 0
    for name, tensor in state.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # safetensors refuses tensors that share memory, as the rows of a fused one do: copied a shard at a time.
        copies = {name: state[name].detach().to("cpu", copy=True).contiguous() for name in names}
        save_file(copies, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o666 & ~_umask())
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse_foreign_files(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ModelError(f"cannot write a model folder to {path}: a file is there; choose another path")
    foreign = [file.name for file in path.iterdir() if not any(file.match(pattern) for pattern in _OUR_FILES)]
    if foreign:
        raise ModelError(
            f"cannot write a model to {path}: it holds {len(foreign)} other file(s), {min(foreign)} first; "
            "choose an empty folder"
        )


def _move_into_place(temporary: Path, path: Path) -> None:
    """Renames, with what was there before put aside, so that ``path`` never shows a half-written model."""
    if not path.exists():
        temporary.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    path.rename(old / "model")
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Weight files, each with the tensors that the index expects in it (None: no index, whatever it holds)."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ModelError(f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors weights are read")
        return {folder / SINGLE: None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            names = files.setdefault(folder / file, [])
            assert names is not None
            names.append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({type(error).__name__}: {error}); {_REMEDY}") from None
    missing = sorted(file.name for file in files if not file.exists())
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:4])}; {_REMEDY}")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} ({file.stat().st_size} bytes) is truncated or corrupt: {error}; {_REMEDY}") from None


def _check_header(file: Path, names: list[str] | None, spec: ModelSpec, table: dict[str, Place]) -> list[str]:
    """The names of the tensors in a shard, all of which are known and of the right shape and type."""
    with _opened(file) as shard:
        present = [name for name in shard.keys() if not _ignorable(name)]  # noqa: SIM118 (not a mapping)
        if names is not None:
            _check_names(str(file), present, [name for name in names if not _ignorable(name)])
        for name in present:
            place = table.get(name)
            if name == TIED_HEAD and spec.tie_embeddings:
                place = table[embedding_name(spec)]
            if place is None:
                continue  # named with all the others, once every file has been seen
            slice_ = shard.get_slice(name)
            if tuple(slice_.get_shape()) != place.shape:
                raise ModelError(_wrong_shape(str(file), name, tuple(slice_.get_shape()), place.shape))
            if slice_.get_dtype() not in _STORED_DTYPES:
                raise ModelError(
                    f"{file}: {name} is stored as {slice_.get_dtype()}; supported are {', '.join(_STORED_DTYPES)}"
                )
    return present


def _ignorable(name: str) -> bool:
    """Old Llama folders carry the rotary frequencies, which the config gives as well."""
    return name.endswith("rotary_emb.inv_freq")


def _their_shapes(table: dict[str, Place]) -> dict[str, tuple[int, ...]]:
    return {name: place.shape for name, place in table.items()}


def _check_shapes(where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    _check_names(where, found, expected)
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelError(_wrong_shape(where, name, found[name], shape))


def _wrong_shape(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"{where}: {name} has shape {list(found)}, the config asks for {list(expected)}; they are of different models"
    )


def _check_names(where: str, found: Iterable[str], expected: Iterable[str]) -> None:
    found, expected = set(found), set(expected)
    for kind, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ModelError(f"{where} {kind} {len(names)} of {len(expected)} tensors: {some}; {_REMEDY}")


def _check_tied(head: Tensor, embedding: Tensor | None, where: str) -> None:
    if embedding is None or not torch.equal(head, embedding):
        raise ModelError(
            f"{where}: {TIED_HEAD} differs from the embedding, but config.json ties them; "
            "set tie_word_embeddings to false there"
        )


__all__ = [
    "Place",
    "check_folder",
    "from_hf_state",
    "layout",
    "load_model",
    "parameter_shapes",
    "save_model",
    "to_hf_state",
]
