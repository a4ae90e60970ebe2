"""The weights of a decoder: read from safetensors into fused tensors, or random for benchmarks.

The file headers are checked against the config before anything is allocated.
Then each tensor is read straight to the device, one at a time, into its slice of
a fused tensor, so the peak beyond the weights themselves is one tensor.

Shapes: E = hidden size, V = vocabulary, X = H * D (H query heads of dim D),
P = (H + 2K) * D (K kv heads), F = intermediate size; gate and up together are 2F.
"""

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import ModelConfig, no_checkpoint
from models.errors import CheckpointError
from models.families import FAMILIES, TensorNames
from models.json_fields import read_json


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer; every projection is [rows out, columns in], as in `torch.nn.Linear`."""

    input_norm_E: Tensor
    input_norm_bias_E: Tensor | None
    qkv_PE: Tensor  # rows of q, then k, then v
    qkv_bias_P: Tensor | None
    query_norm_D: Tensor | None  # of every query head, as the next one of every key head
    key_norm_D: Tensor | None
    out_EX: Tensor
    out_bias_E: Tensor | None
    post_norm_E: Tensor  # before the MLP
    post_norm_bias_E: Tensor | None
    gate_up_FE: Tensor  # 2F rows: gate, then up; or F rows: up alone
    gate_up_bias_F: Tensor | None  # as many values
    down_EF: Tensor
    down_bias_E: Tensor | None


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """All weights of a decoder, of one dtype, on one device."""

    embed_VE: Tensor
    positions_LE: Tensor | None  # L = rows of learned positions, those before position 0 too
    layers: tuple[LayerWeights, ...]
    final_norm_E: Tensor
    final_norm_bias_E: Tensor | None
    lm_head_VE: Tensor  # the same tensor object as embed_VE where they are tied


_DTYPES = ("F64", "F32", "F16", "BF16")  # as the header calls them; no others hold plain weights
_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "consolidated.*.pth")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_weights(
    directory: Path, config: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> DecoderWeights:
    """Read model.safetensors, or the shards that model.safetensors.index.json names.

    Raises:
        CheckpointError: The files are missing or damaged, or hold other tensors than `config` says.
    """
    files = weight_files(directory)
    headers = _read_headers(files)
    family = FAMILIES[config.architecture]
    names = _names(family.tensors, headers)
    embed = _embed_name(names, config, headers)
    lm_head = f"{names.lm_head}.weight" if config.tie_word_embeddings else None
    wanted = _slices(_empty(config, torch.device("meta"), dtype), config, names, embed)
    single = files == [directory / _SINGLE]
    ignored = {name for name in headers if name == lm_head or name.endswith(family.harmless)}
    _check_names(wanted, headers, ignored, directory / (_SINGLE if single else _INDEX))
    _check_tensors(wanted, headers)
    weights = _empty(config, device, dtype)
    slices = _slices(weights, config, names, embed)
    for path in files:
        with _open(path, device) as file:
            for name in (name for name in slices if headers[name].path == path):
                slices[name].copy_(file.get_tensor(name))
    if family.qkv_by_head:
        for layer in weights.layers:
            _sort_qkv_(layer, config.head_dim)
    if lm_head in headers.keys() - slices.keys():
        _check_tied_head(weights.embed_VE, lm_head, headers[lm_head].path)
    return weights


def random_weights(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, seed: int
) -> DecoderWeights:
    """Return weights of the same structure, normal(0, 0.02), for benchmarks; norms are 1."""
    rng = torch.Generator(device).manual_seed(seed)
    weights = _empty(config, device, dtype)
    for tensor in _tensors(weights):
        tensor.normal_(0.0, 0.02, generator=rng)
    for layer in weights.layers:
        for norm in (layer.input_norm_E, layer.query_norm_D, layer.key_norm_D, layer.post_norm_E):
            if norm is not None:
                norm.fill_(1.0)
    weights.final_norm_E.fill_(1.0)
    return weights


def weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes that the weights take on a device; allocates nothing."""
    tensors = _tensors(_empty(config, torch.device("meta"), dtype))
    return sum(tensor.numel() for tensor in tensors) * dtype.itemsize


def _empty(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> DecoderWeights:
    """Allocate every tensor, fused, with its final shape, and not yet a value."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def norm_bias() -> Tensor | None:
        return empty(hidden) if config.norm == "layer" else None

    hidden, inner = config.hidden_size, config.intermediate_size
    gate_up = 2 * inner if config.gated_mlp else inner
    positions = config.max_position_embeddings + config.position_offset
    attention = config.num_heads * config.head_dim
    qkv = attention + 2 * config.num_kv_heads * config.head_dim
    embed_VE = empty(config.vocab_size, hidden)
    layers = tuple(
        LayerWeights(
            input_norm_E=empty(hidden),
            input_norm_bias_E=norm_bias(),
            qkv_PE=empty(qkv, hidden),
            qkv_bias_P=empty(qkv) if config.attention_bias else None,
            query_norm_D=empty(config.head_dim) if config.qk_norm else None,
            key_norm_D=empty(config.head_dim) if config.qk_norm else None,
            out_EX=empty(hidden, attention),
            out_bias_E=empty(hidden) if config.attention_out_bias else None,
            post_norm_E=empty(hidden),
            post_norm_bias_E=norm_bias(),
            gate_up_FE=empty(gate_up, hidden),
            gate_up_bias_F=empty(gate_up) if config.mlp_bias else None,
            down_EF=empty(hidden, inner),
            down_bias_E=empty(hidden) if config.mlp_bias else None,
        )
        for _ in range(config.num_layers)
    )
    return DecoderWeights(
        embed_VE=embed_VE,
        positions_LE=empty(positions, hidden) if config.rope is None else None,
        layers=layers,
        final_norm_E=empty(hidden),
        final_norm_bias_E=norm_bias(),
        lm_head_VE=embed_VE if config.tie_word_embeddings else empty(config.vocab_size, hidden),
    )


def _tensors(weights: DecoderWeights) -> list[Tensor]:
    """Return every tensor once, also where two fields share one."""
    values = [value for part in (weights, *weights.layers) for value in vars(part).values()]
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


# Names of modules, the rows of each (or of every one), and the weight and bias they make up.
_Fused = tuple[tuple[str, ...], int | list[int], Tensor | None, Tensor | None]


def _slices(
    weights: DecoderWeights, config: ModelConfig, names: TensorNames, embed: str
) -> dict[str, Tensor]:
    """Map each tensor name of the checkpoint to the view that it fills."""
    hidden, vocab, top = config.hidden_size, config.vocab_size, names.prefix
    modules: list[_Fused] = [
        ((embed,), vocab, weights.embed_VE, None),
        ((top + names.final_norm,), hidden, weights.final_norm_E, weights.final_norm_bias_E),
    ]
    if weights.positions_LE is not None:
        rows = len(weights.positions_LE)
        modules.append(((top + names.positions,), rows, weights.positions_LE, None))
    if not config.tie_word_embeddings:
        modules.append(((names.lm_head,), vocab, weights.lm_head_VE, None))
    slices = _split("", modules)
    transposed = FAMILIES[config.architecture].transposed
    for index, layer in enumerate(weights.layers):
        parts = _split(top + names.layer.format(index), _layer_modules(layer, config, names))
        slices |= {name: part.t() if transposed else part for name, part in parts.items()}
    return slices


def _layer_modules(layer: LayerWeights, config: ModelConfig, names: TensorNames) -> list[_Fused]:
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = [query, key, key] if len(names.qkv) == 3 else query + 2 * key
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    return [
        ((names.input_norm,), hidden, layer.input_norm_E, layer.input_norm_bias_E),
        (names.qkv, qkv, layer.qkv_PE, layer.qkv_bias_P),
        ((names.query_norm,), head_dim, layer.query_norm_D, None),
        ((names.key_norm,), head_dim, layer.key_norm_D, None),
        ((names.out,), hidden, layer.out_EX, layer.out_bias_E),
        ((names.post_norm,), hidden, layer.post_norm_E, layer.post_norm_bias_E),
        (names.gate_up, inner, layer.gate_up_FE, layer.gate_up_bias_F),
        ((names.down,), hidden, layer.down_EF, layer.down_bias_E),
    ]


def _split(prefix: str, modules: list[_Fused]) -> dict[str, Tensor]:
    """Cut fused tensors into one part for each module, by its name in the file."""
    slices: dict[str, Tensor] = {}
    for names, rows, weight, bias in modules:
        for suffix, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                parts = zip(names, tensor.split(rows), strict=True)
                slices |= {f"{prefix}{name}.{suffix}": part for name, part in parts}
    return slices


def _sort_qkv_(layer: LayerWeights, head_dim: int) -> None:
    """Reorder rows of q, k and v of each head in turn to rows of q, then k, then v."""
    for tensor in (layer.qkv_PE, layer.qkv_bias_P):
        if tensor is not None:
            by_head = tensor.unflatten(0, (-1, 3, head_dim))
            tensor.copy_(by_head.transpose(0, 1).flatten(0, 2))


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in order; all of them are there."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    index = directory / _INDEX
    if not index.is_file():
        raise _no_safetensors(directory)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} lacks weight_map, the file that each tensor lies in")
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        # Judged by its text: links inside the directory may well lead to a blob store outside.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{index} names {name}, which lies outside of its directory")
        if not (directory / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not there: download it")
    return [directory / name for name in files]


def _no_safetensors(directory: Path) -> CheckpointError:
    pickles = sorted(path.name for glob in _PICKLE_PATTERNS for path in directory.glob(glob))
    if pickles:
        return CheckpointError(
            f"{directory} holds its weights as pickle ({pickles[0]}), which can run code when read:"
            " convert it with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            " of transformers, which writes safetensors"
        )
    if directory.is_dir() and any(directory.glob("*.safetensors")):
        return CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}")
    return no_checkpoint(directory)


@contextmanager
def _open(path: Path, device: torch.device) -> Iterator[Any]:
    """Open a safetensors file for reading to `device`; a damaged one is a CheckpointError."""
    if path.exists() and not os.access(path, os.R_OK):
        raise CheckpointError(f"cannot read {path}: this user may not, see its mode and owner")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({error}): download it again"
        ) from error


@dataclass(frozen=True)
class _Header:
    """What a file says of one tensor."""

    path: Path
    shape: list[int]
    dtype: str  # as safetensors calls it


def _read_headers(files: list[Path]) -> dict[str, _Header]:
    headers: dict[str, _Header] = {}
    for path in files:
        with _open(path, torch.device("cpu")) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                part = file.get_slice(name)
                headers[name] = _Header(path, list(part.get_shape()), str(part.get_dtype()))
    return headers


def _names(known: tuple[TensorNames, ...], headers: Mapping[str, _Header]) -> TensorNames:
    """Return the names that these files use; the first ones, if they use none."""

    def count(names: TensorNames) -> int:
        outside_layers = (names.prefix + names.final_norm, names.lm_head)
        return sum(f"{module}.weight" in headers for module in outside_layers)

    return max(known, key=count)


def _embed_name(names: TensorNames, config: ModelConfig, headers: Mapping[str, _Header]) -> str:
    """Return the module to read; safetensors keeps one of two tied tensors, maybe the other one."""
    embed, lm_head = names.prefix + names.embed, names.lm_head
    if config.tie_word_embeddings and f"{embed}.weight" not in headers:
        return lm_head if f"{lm_head}.weight" in headers else embed
    return embed


def _check_names(
    slices: Mapping[str, Tensor],
    headers: Mapping[str, _Header],
    ignored: Set[str],
    source: Path,
) -> None:
    """Refuse tensors that are missing, and tensors that the model would leave unused."""
    missing = sorted(slices.keys() - headers.keys())
    if missing:
        raise CheckpointError(f"{source} lacks {_some(missing)}")
    extra = sorted(headers.keys() - slices.keys() - ignored)
    if extra:
        raise CheckpointError(
            f"{source} holds {_some(extra)}, which config.json does not account for:"
            " serving without would give wrong answers"
        )


def _check_tensors(slices: Mapping[str, Tensor], headers: Mapping[str, _Header]) -> None:
    """Refuse tensors that are misshapen or quantized."""
    for name, expected in slices.items():
        header, shape = headers[name], list(expected.shape)
        if header.shape != shape:
            raise CheckpointError(
                f"{name} in {header.path} has shape {header.shape}, expected {shape} by config.json"
            )
        if header.dtype not in _DTYPES:
            raise CheckpointError(
                f"{name} in {header.path} is stored as {header.dtype},"
                f" supported: {', '.join(_DTYPES)}"
            )


def _check_tied_head(embed_VE: Tensor, name: str, path: Path) -> None:
    """Refuse a tied checkpoint whose stored output projection is not its embedding."""
    with _open(path, embed_VE.device) as file:
        if torch.equal(file.get_tensor(name).to(embed_VE.dtype), embed_VE):
            return
    raise CheckpointError(
        f"{name} in {path} differs from the embedding that config.json ties it to:"
        " set tie_word_embeddings to false if it is meant to be used"
    )


def _some(names: list[str]) -> str:
    """Name the first three, and count the rest."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
