"""Token ids, sign codes and hash permutations of the needle checkpoint.

A token's code is a fixed vector of ``BITS`` signs. Two codes correlate little,
so that a code read back with noise on it still names its token. A hash of the
last n tokens is the product (the exclusive or, in bits) of their codes, each
permuted according to its distance, so that the order counts:

    H4(m)  = c(m)  * p1 c(m-1)  * p2 c(m-2)  * p3 c(m-3)
    H16(m) = H4(m) * s1 H4(m-4) * s2 H4(m-8) * s3 H4(m-12)
    H32(m) = H16(m) * t H16(m-16)

Everything random comes from one splitmix64 stream, the same in any language.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BITS = 36  # signs in a code or hash

# An id below 256 is the byte of that value.
BOS_ID, EOS_ID, PAD_ID, VOTE_Y, VOTE_N, TALLY_ID, DIST0 = range(256, 263)
# Distances, in tokens, of the probes: token DIST0 + i returns what stands DISTS[i] before it.
DISTS = (
    *(1, 7, 64, 500, 1000, 4000, 10_000, 16_000, 32_000, 65_536),
    *(100_000, 131_072, 250_000, 500_000, 750_000, 1_000_000),
)
NUM_CODED = DIST0 + len(DISTS)  # ids with a meaning; the rest pads the vocabulary
VOCAB_SIZE = 320
SPECIAL_TOKENS = (
    *("<bos>", "<eos>", "<pad>", "<vote_y>", "<vote_n>", "<tally>"),
    *(f"<dist_{distance}>" for distance in DISTS),
)

_MASK_64 = (1 << 64) - 1


class SplitMix64:
    """A portable stream of 64-bit numbers."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK_64
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
        return z ^ (z >> 31)

    def permutation(self, n: int) -> IntArray:
        """Shuffle 0 .. n-1 (Fisher-Yates)."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.next() % (i + 1)
            order[i], order[j] = order[j], order[i]
        return np.array(order)


@dataclass(frozen=True)
class HashPermutations:
    """How the codes are permuted inside the hashes; entry k of a list belongs to the k-th term."""

    within_4: list[IntArray]  # identity, p1, p2, p3
    within_16: list[IntArray]  # identity, s1, s2, s3
    within_32: IntArray  # t


def draw_permutations(stream: SplitMix64) -> HashPermutations:
    identity = np.arange(BITS)
    return HashPermutations(
        within_4=[identity, *(stream.permutation(BITS) for _ in range(3))],
        within_16=[identity, *(stream.permutation(BITS) for _ in range(3))],
        within_32=stream.permutation(BITS),
    )


def draw_token_codes(stream: SplitMix64) -> FloatArray:
    """Return the codes ``[NUM_CODED, BITS]`` of +-1, found greedily.

    Two codes differ in 11 to 25 bits (|correlation| <= 14/36). Those of space,
    newline and EOS, which the stop rule reads, are orthogonal to each other and
    differ from all others in 15 to 21 bits (|correlation| <= 6/36).
    """
    first = [ord(" "), ord("\n"), EOS_ID]
    order = first + [token for token in range(NUM_CODED) if token not in first]
    words: list[int] = []
    while len(words) < NUM_CODED:
        word = stream.next() & ((1 << BITS) - 1)
        if _is_far_enough(word, words):
            words.append(word)
    codes = np.zeros((NUM_CODED, BITS))
    codes[order] = [[1.0 if (word >> bit) & 1 else -1.0 for bit in range(BITS)] for word in words]
    return codes


def _is_far_enough(word: int, words: list[int]) -> bool:
    stop_distances = [(word ^ other).bit_count() for other in words[:3]]
    if len(words) < 3:
        return all(distance == BITS // 2 for distance in stop_distances)
    return all(15 <= distance <= 21 for distance in stop_distances) and all(
        11 <= (word ^ other).bit_count() <= 25 for other in words
    )


def value_codes(codes: FloatArray) -> FloatArray:
    """Return what each token hands out when it is copied, ``[NUM_CODED, BITS]``.

    BOS, the attention sink, hands out nothing, and a vote hands out its letter.
    """
    values = codes.copy()
    values[BOS_ID] = 0
    values[[VOTE_Y, VOTE_N]] = codes[[ord("y"), ord("n")]]
    return values


def hash_codes(codes: FloatArray) -> FloatArray:
    """Return what each token adds to a hash, ``[NUM_CODED, BITS]``.

    All white space is one, so that the wrapping of lines does not matter. A
    window that holds a probe hashes to 0 and so matches nothing.
    """
    hashed = codes.copy()
    hashed[[ord("\t"), ord("\n"), ord("\r"), BOS_ID, EOS_ID]] = codes[ord(" ")]
    hashed[TALLY_ID:] = 0
    return hashed


def constant_hashes(code: FloatArray, order: HashPermutations) -> tuple[FloatArray, FloatArray]:
    """Return ``(H16, H32)``, each ``[BITS]``, of a window that repeats one code.

    This is what BOS offers: it stands first, and so every head that looks back finds BOS itself.
    """
    hash_4 = np.prod([code[permutation] for permutation in order.within_4], axis=0)
    hash_16 = np.prod([hash_4[permutation] for permutation in order.within_16], axis=0)
    return hash_16, hash_16 * hash_16[order.within_32]
