"""Bytes are compared with their checksum while they are copied."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.kv.pieces import SLICE_BYTES, BadPiece, checksum, copy_verified
from tests.kv_records import noise


@pytest.mark.parametrize("size", [0, 1, SLICE_BYTES - 1, SLICE_BYTES, 2 * SLICE_BYTES + 77])
def test_a_verified_copy_is_the_source(size: int) -> None:
    """Whatever the length: the last slice is seldom a whole one."""
    source, target = noise(size), bytearray(size)
    copy_verified(memoryview(source), memoryview(target), checksum(source))
    assert target == source


@given(st.integers(0, 8 * (SLICE_BYTES + 9) - 1))
def test_one_flipped_bit_is_noticed_anywhere(bit: int) -> None:
    """What the rank would compute with is what was verified."""
    source = bytearray(noise(SLICE_BYTES + 9))
    expected = checksum(bytes(source))
    source[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadPiece, match="damaged"):
        copy_verified(memoryview(source), memoryview(bytearray(len(source))), expected)
