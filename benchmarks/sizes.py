"""What each section of `benchmarks.gpu` runs: in full, quickly, and as a toy on CPU."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.shapes import LLAMA_3_8B, TOY, Shape

K = 1024
M = 1024 * 1024
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Needle:
    """One context for the needle model; ``answer``: also prefill and decode one question."""

    num_tokens: int
    dtype: Dtype
    answer: bool


@dataclass(frozen=True, kw_only=True)
class Restore:
    """One prefix in the store, of a shape of `cluster.bench.restore_shapes`."""

    shape: str
    num_tokens: int
    num_layers: int = 32
    hidden_size: int = 4096
    kv_width: int  # of a token in one layer, keys and values
    dtype: Dtype = "bfloat16"
    repeats: int = 3


def _opt(num_tokens: int) -> Restore:
    return Restore(shape="opt-6.7b", num_tokens=num_tokens, kv_width=2 * 4096)


def _llama(num_tokens: int) -> Restore:
    return Restore(shape="llama-3-8b", num_tokens=num_tokens, kv_width=2 * 1024)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a whole run."""

    nccl_ranks: int = 2
    only_checks: tuple[str, ...] = ()  # of tests/gpu_checks.py; none named: all
    needles: tuple[Needle, ...] = (
        Needle(num_tokens=128 * K, dtype="bfloat16", answer=True),
        Needle(num_tokens=128 * K, dtype="float32", answer=True),
        Needle(num_tokens=512 * K, dtype="bfloat16", answer=True),
        Needle(num_tokens=M, dtype="bfloat16", answer=True),
        Needle(num_tokens=512 * K, dtype="float32", answer=False),
        Needle(num_tokens=M, dtype="float32", answer=False),
    )
    gemm_edge: int = 8192
    copy_bytes: int = 4 * K * M
    attention_tokens: tuple[int, ...] = (8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
    shape: Shape = LLAMA_3_8B
    prefill_tokens: tuple[int, ...] = (8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
    decode_contexts: tuple[int, ...] = (K, 8 * K, 32 * K, 128 * K)
    decode_steps: int = 20
    restores: tuple[Restore, ...] = (_opt(8 * K), _llama(8 * K), _llama(32 * K), _llama(128 * K))
    repeats: int = 5


FULL = Sizes()
QUICK = Sizes(
    needles=(Needle(num_tokens=128 * K, dtype="bfloat16", answer=True),),
    attention_tokens=(8 * K, 32 * K),
    prefill_tokens=(8 * K, 32 * K),
    decode_contexts=(K, 32 * K),
    restores=(_opt(8 * K), _llama(8 * K)),
    repeats=3,
)
ON_CPU = Sizes(
    only_checks=("check_strided_inputs[float32]", "check_pages[float32]"),
    needles=(Needle(num_tokens=1500, dtype="float32", answer=True),),
    gemm_edge=256,
    copy_bytes=4 * M,
    attention_tokens=(256,),
    shape=TOY,
    prefill_tokens=(300,),
    decode_contexts=(300,),
    decode_steps=3,
    restores=(
        Restore(
            shape="llama-3",
            num_tokens=512,
            num_layers=2,
            hidden_size=64,
            kv_width=32,
            dtype="float32",
            repeats=1,
        ),
    ),
    repeats=2,
)
