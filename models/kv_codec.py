"""How one layer of a piece of KV is written as bytes: as it is, or smaller and with a loss.

    raw    the values as they are
    int8   a byte a value, by the largest magnitude of each token's row of a head
    fp8    the same in e4m3 floating point
    int4   half a byte a value between the smallest and the largest of a group, as in KIVI
           (arXiv 2402.02750): groups of a key channel's neighbouring tokens, for channels
           of keys have outliers, and of a value row's neighbouring channels

What codes are relative to (magnitudes, limits) are values that occur, kept in the cache's
own dtype. So they are exact, whatever the magnitude, finite KV comes back finite, and
encoding what was decoded loses nothing more.

A layer is ``kv_2KSD``: keys, then values; heads, tokens, head dim. Its parts and itself take
multiples of 64 bytes: layers of a record are aligned, and raw ones are read in place.
Letters: K = KV heads, S = tokens, D = head dim, G = groups.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from attention.quantised import decode_rows, encode_rows

Encoding = Literal["raw", "int8", "int4", "fp8"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
GROUP = 32  # tokens, or channels, that share limits in int4
ALIGNMENT = 64
_MOST = 15  # an int4 code

_Part = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


def layer_bytes(
    encoding: Encoding, *, num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Return the bytes of one encoded layer, a multiple of 64."""
    parts = _parts(encoding, num_kv_heads, num_tokens, head_dim, dtype)
    return sum(_aligned_bytes(part) for part in parts)


def encode(encoding: Encoding, kv_2KSD: Tensor, out: Tensor) -> None:
    """Write a layer to ``out``, uint8 of `layer_bytes`; what is between its parts becomes zeros."""
    parts = _views(encoding, out, kv_2KSD.shape, kv_2KSD.dtype)
    for (part, padding), values in zip(parts, _encoded(encoding, kv_2KSD), strict=True):
        part.copy_(values)
        padding.zero_()  # it may hold what another tenant had there


def decode(encoding: Encoding, data: Tensor, out_2KSD: Tensor) -> None:
    """Read a layer from ``data``, uint8 of `layer_bytes`, into values of the cache's dtype."""
    parts = [part for part, _ in _views(encoding, data, out_2KSD.shape, out_2KSD.dtype)]
    if encoding == "raw":
        out_2KSD.copy_(parts[0])
    elif encoding == "int4":
        packed, key_limits_2KGD, value_limits_2KSG = parts
        _decode_int4(packed, key_limits_2KGD, value_limits_2KSG, out_2KSD)
    else:
        codes, largest = parts
        out_2KSD.copy_(decode_rows(encoding, codes, largest))


def _encoded(encoding: Encoding, kv_2KSD: Tensor) -> tuple[Tensor, ...]:
    if encoding == "raw":
        return (kv_2KSD,)
    if encoding == "int4":
        return _encode_int4(kv_2KSD)
    return encode_rows(encoding, kv_2KSD)


def _parts(encoding: Encoding, K: int, S: int, D: int, dtype: torch.dtype) -> list[_Part]:
    if encoding == "raw":
        return [((2, K, S, D), dtype)]
    if encoding == "int4":
        key_limits, value_limits = (2, K, _groups(S), D), (2, K, S, _groups(D))
        return [((K * S * D,), torch.uint8), (key_limits, dtype), (value_limits, dtype)]
    return [((2, K, S, D), torch.uint8), ((2, K, S, 1), dtype)]


def _views(
    encoding: Encoding, data: Tensor, shape_2KSD: torch.Size, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each part of a layer's bytes, with its shape and dtype, and the padding behind it."""
    _, K, S, D = shape_2KSD
    start = 0
    for part in _parts(encoding, K, S, D, dtype):
        shape, part_dtype = part
        end, next_start = start + _num_bytes(part), start + _aligned_bytes(part)
        yield data[start:end].view(part_dtype).view(shape), data[end:next_start]
        start = next_start
    assert start == len(data), "the layer has another size"


def _num_bytes(part: _Part) -> int:
    shape, dtype = part
    return torch.Size(shape).numel() * dtype.itemsize


def _aligned_bytes(part: _Part) -> int:
    return -(-_num_bytes(part) // ALIGNMENT) * ALIGNMENT


def _groups(size: int) -> int:
    return -(-size // GROUP)


def _encode_int4(kv_2KSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes, and smallest and largest values of the groups of keys and of values."""
    keys_KSD, values_KSD = kv_2KSD
    key_limits_2KGD = _limits(keys_KSD, dim=1)
    value_limits_2KSG = _limits(values_KSD, dim=2)
    codes_2KSD = torch.stack(
        [
            _codes(keys_KSD, _spread(key_limits_2KGD, 2, keys_KSD.shape[1])),
            _codes(values_KSD, _spread(value_limits_2KSG, 3, values_KSD.shape[2])),
        ]
    )
    low, high = codes_2KSD.view(-1, 2).unbind(1)
    return low | (high << 4), key_limits_2KGD, value_limits_2KSG


def _decode_int4(
    packed: Tensor, key_limits_2KGD: Tensor, value_limits_2KSG: Tensor, out_2KSD: Tensor
) -> None:
    codes_2KSD = torch.stack([packed & _MOST, packed >> 4], dim=1).view(out_2KSD.shape)
    limits = (
        _spread(key_limits_2KGD, 2, out_2KSD.shape[2]),
        _spread(value_limits_2KSG, 3, out_2KSD.shape[3]),
    )
    for out_KSD, codes_KSD, (low, high) in zip(out_2KSD, codes_2KSD, limits, strict=True):
        # Not low + share * (high - low): the difference may be too large for a float.
        shares = codes_KSD.float() / _MOST
        out_KSD.copy_(low.float() * (1.0 - shares) + high.float() * shares)


def _limits(x_KSD: Tensor, dim: int) -> Tensor:
    """Return the smallest and the largest value of each group along a dimension, ``[2, ...]``."""
    padding = -x_KSD.shape[dim] % GROUP
    # The last value once more, which changes no limit of the last group.
    last = x_KSD.narrow(dim, x_KSD.shape[dim] - 1, 1)
    sizes = [padding if index == dim else size for index, size in enumerate(last.shape)]
    groups = torch.cat([x_KSD, last.expand(sizes)], dim=dim).unflatten(dim, (-1, GROUP))
    return torch.stack(groups.aminmax(dim=dim + 1))


def _spread(limits: Tensor, dim: int, size: int) -> Tensor:
    """Return a group's limits at each of its values."""
    return limits.repeat_interleave(GROUP, dim=dim).narrow(dim, 0, size)


def _codes(x_KSD: Tensor, limits_2KSD: Tensor) -> Tensor:
    """Return codes 0 to 15, uint8: where a value lies between its group's limits."""
    # Halved, for a difference of two floats of the largest magnitude would be infinite.
    low_KSD, high_KSD = limits_2KSD.float() / 2
    width_KSD = high_KSD - low_KSD
    width_KSD.masked_fill_(width_KSD == 0.0, 1.0)
    return ((x_KSD.float() / 2 - low_KSD) / width_KSD * _MOST).round().to(torch.uint8)
