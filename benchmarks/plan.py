"""What `benchmarks.gpu` would do on one H200: each piece with its size, time and memory.

The rates are guesses made before anything was measured, and this plan is all
that is computed from them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.shapes import GB, NEEDLE, attention_flops
from benchmarks.sizes import K, Needle, Sizes

GEMM_FLOP_PER_S = 700e12  # bfloat16
FLASH_FLOP_PER_S = 350e12  # head dim 128; less is reached with smaller heads
NEEDLE_FLOP_PER_S = {"bfloat16": 250e12, "float32": 20e12}
BYTES_PER_S = 4e12
PINNED_BYTES_PER_S = 20e9  # verified, to the device
RESTORE_START_S = 30.0  # profiles, and pinning
LAUNCHES_S = 6e-3  # of one decode step's kernels, one by one
START_S = 15.0  # of a section's process, with a CUDA context
NEEDLE_TEXT_S_PER_TOKEN = 2e-6  # writing an exam, and a text to ask about
ITEMSIZE = {"float32": 4, "bfloat16": 2}
DEVICE_BYTES = 141e9


@dataclass(frozen=True)
class Piece:
    """One piece of a section, as planned."""

    what: str
    seconds: float
    memory_bytes: float = 0.0

    def line(self) -> str:
        """Return the piece as one line for people."""
        memory = f", {self.memory_bytes / GB:.1f} GB" if self.memory_bytes else ""
        return f"{self.what}: about {self.seconds:.0f} s{memory}"


def _nccl(sizes: Sizes) -> Iterator[Piece]:
    yield Piece(f"{sizes.nccl_ranks} ranks, every check of tests/ring_conformance.py", 30)


def _checks(sizes: Sizes) -> Iterator[Piece]:
    yield Piece("tests/gpu: kernels, pages, ring and workers in float32, bfloat16, float16", 90)


def _needle(sizes: Sizes) -> Iterator[Piece]:
    for needle in sizes.needles:
        runs = 2 if needle.answer else 1
        compute_s = NEEDLE.causal_flops(needle.num_tokens) / NEEDLE_FLOP_PER_S[needle.dtype]
        text_s = NEEDLE_TEXT_S_PER_TOKEN * needle.num_tokens
        yield Piece(
            f"{needle.num_tokens // K}K tokens in {needle.dtype}, every question and probe"
            + (", and one answer decoded" if needle.answer else ""),
            runs * (compute_s + text_s),
            needle_bytes(needle),
        )


def needle_bytes(needle: Needle) -> float:
    """Peak bytes of an exam: keys and values, and activations or the logits of all rows."""
    itemsize = ITEMSIZE[needle.dtype]
    logits = needle.num_tokens * (NEEDLE.vocab_size * (itemsize + 4) + 2 * 256 * itemsize)
    activations = NEEDLE.activation_bytes(needle.num_tokens, itemsize)
    return NEEDLE.kv_bytes(needle.num_tokens, itemsize) + max(activations, logits)


def _rates(sizes: Sizes) -> Iterator[Piece]:
    edge = sizes.gemm_edge
    gemm_s = 20 * 2.0 * edge**3 / GEMM_FLOP_PER_S
    yield Piece(f"{edge} x {edge} x {edge} in bfloat16 and float32", 12 * gemm_s, 12.0 * edge**2)
    copied = sizes.copy_bytes
    yield Piece(f"device copy of {copied / GB:.1f} GB", 40 * copied / BYTES_PER_S, 2.0 * copied)


def _attention(sizes: Sizes) -> Iterator[Piece]:
    for num_tokens in sizes.attention_tokens:
        flops = 1.5 * attention_flops(num_tokens, 32, 128, causal=False)
        calls = sizes.repeats + 1
        yield Piece(
            f"{num_tokens // K}K queries and keys, 32 / 8 heads of 128, causal and full, flash and"
            " cuDNN in bfloat16",
            2 * calls * flops / FLASH_FLOP_PER_S,
            num_tokens * 128 * (48 * 2 + 2 * 32 * (2 + 4)),
        )


def _prefill(sizes: Sizes) -> Iterator[Piece]:
    shape = sizes.shape
    for num_tokens in sizes.prefill_tokens:
        once_s = shape.linear_flops(num_tokens) / GEMM_FLOP_PER_S
        once_s += shape.causal_flops(num_tokens) / FLASH_FLOP_PER_S
        kept = shape.weights_bytes(2) + shape.kv_bytes(num_tokens, 2)
        yield Piece(
            f"{num_tokens // K}K tokens, random weights in bfloat16",
            (sizes.repeats + 1) * once_s,
            kept + shape.activation_bytes(num_tokens, 2),
        )


def _decode(sizes: Sizes) -> Iterator[Piece]:
    shape = sizes.shape
    for context in sizes.decode_contexts:
        step_s = LAUNCHES_S + shape.decode_bytes(context, 2) / BYTES_PER_S
        yield Piece(
            f"{sizes.decode_steps} tokens after {context // K}K",
            sizes.decode_steps * step_s,
            shape.weights_bytes(2) + shape.kv_bytes(context, 2),
        )


def _restore(sizes: Sizes) -> Iterator[Piece]:
    for restore in sizes.restores:
        tokens, layers = restore.num_tokens, restore.num_layers
        weights = 12.0 * layers * restore.hidden_size**2
        kv = tokens * layers * restore.kv_width * ITEMSIZE[restore.dtype]
        inputs = tokens * layers * restore.hidden_size * ITEMSIZE[restore.dtype]
        ids_s = 2 * weights * tokens / GEMM_FLOP_PER_S
        attended = attention_flops(tokens, restore.hidden_size // 128 or 1, 128, causal=True)
        ids_s += layers * attended / FLASH_FLOP_PER_S
        copy_s = (kv + inputs) / PINNED_BYTES_PER_S
        # Of about 16 ways twelve move bytes, and the rest compute most of the prefix.
        rounds = restore.repeats + 2
        yield Piece(
            f"{restore.shape}, {tokens // K}K tokens from pinned host memory, every way back",
            RESTORE_START_S + 2 * ids_s + rounds * (12 * copy_s + 4 * ids_s),
            2 * weights + 2 * kv,
        )


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a run; it has a process of its own, so that its failure ends nothing else."""

    title: str
    plan: Callable[[Sizes], Iterator[Piece]]
    timeout_s: float


# In this order: what must be right first, then what is measured.
SECTIONS = {
    "nccl": Section(title="Ring conformance between processes", plan=_nccl, timeout_s=300),
    "checks": Section(title="Tests on the device", plan=_checks, timeout_s=600),
    "rates": Section(title="Matrix product and copy rates", plan=_rates, timeout_s=180),
    "attention": Section(title="Attention rate", plan=_attention, timeout_s=300),
    "prefill": Section(title="Prefill of a Llama-3-8B shape", plan=_prefill, timeout_s=600),
    "decode": Section(title="Decode of a Llama-3-8B shape", plan=_decode, timeout_s=300),
    "restore": Section(title="Prefixes from the KV store", plan=_restore, timeout_s=1800),
    "needle": Section(title="Needle exams", plan=_needle, timeout_s=1800),
}


def describe(sizes: Sizes, names: list[str]) -> str:
    """Return the plan of these sections as text."""
    lines, total_s, peak_bytes = [], 0.0, 0.0
    for name in names:
        pieces = list(SECTIONS[name].plan(sizes))
        seconds = START_S + sum(piece.seconds for piece in pieces)
        total_s += seconds
        peak_bytes = max([peak_bytes, *(piece.memory_bytes for piece in pieces)])
        lines.append(f"{name}: {SECTIONS[name].title}, about {seconds:.0f} s")
        lines += [f"    {piece.line()}" for piece in pieces]
    lines.append(
        f"in all about {total_s / 60:.0f} minutes on one H200, at most {peak_bytes / GB:.0f} of its"
        f" {DEVICE_BYTES / GB:.0f} GB; these are estimates, nothing of it has been measured"
    )
    return "\n".join(lines)
