"""Packed integers come back as they were, take exactly the bytes that are announced, and lie in a pinned bit order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq.formats import packing
from mgvq.formats.packing import MAX_WIDTH, narrowest, pack, packed_bytes, unpack

WIDTHS = range(1, MAX_WIDTH + 1)


@pytest.mark.parametrize("width", WIDTHS)
@settings(derandomize=True, deadline=None, database=None, max_examples=20)
@given(data=st.data())
def test_values_survive_the_round_trip_in_the_announced_bytes(width, data):
    values = torch.tensor(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=41)), dtype=torch.int64)
    packed = pack(values, width)
    assert packed.nbytes == packed_bytes(len(values), width)
    assert unpack(packed, width, len(values)).tolist() == values.tolist()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 7, 9])
def test_the_largest_values_survive_at_odd_counts(width, count):
    values = torch.full((count,), 2**width - 1, dtype=torch.int32)
    assert torch.equal(unpack(pack(values, width), width, count), values)


@settings(derandomize=True, deadline=None, database=None)
@given(count=st.integers(0, 10**9), width=st.integers(1, MAX_WIDTH))
def test_padding_is_less_than_a_byte(count, width):
    assert 0 <= 8 * packed_bytes(count, width) - count * width < 8


def test_the_lowest_bit_comes_first():
    # 5, 3, 6 are 101, 110, 011 from their lowest bit on: the stream 10111001 1 is 157 and 1 as little-endian bytes.
    assert pack(torch.tensor([5, 3, 6]), 3).tolist() == [157, 1]
    assert pack(torch.tensor([0x1234]), 16).tolist() == [0x34, 0x12]


@pytest.mark.parametrize("width", [1, 3, 8, 20])
@pytest.mark.parametrize("count", [15, 16, 17, 48])
def test_chunks_change_no_byte(monkeypatch, width, count):
    values = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(width))
    whole = pack(values, width)
    monkeypatch.setattr(packing, "_CHUNK", 16)
    assert torch.equal(pack(values, width), whole)
    assert torch.equal(unpack(whole, width, count).long(), values)


@pytest.mark.parametrize(("value", "width"), [(-1, 1), (-1, 16), (2, 1), (8, 3), (2**16, 16), (2**32, 16)])
def test_a_value_that_does_not_fit_is_refused(value, width):
    with pytest.raises(ValueError, match=f"do not fit into {width} bits"):
        pack(torch.tensor([0, value]), width)


@pytest.mark.parametrize("width", [-1, 0, MAX_WIDTH + 1])
def test_an_unknown_width_is_refused(width):
    with pytest.raises(ValueError, match="1 to 31 bits"):
        pack(torch.tensor([0]), width)
    with pytest.raises(ValueError, match="1 to 31 bits"):
        unpack(torch.zeros(1, dtype=torch.uint8), width, 1)


@pytest.mark.parametrize("num_bytes", [0, 1, 3])
def test_a_wrong_number_of_bytes_is_refused(num_bytes):
    with pytest.raises(ValueError, match="take 2 bytes"):
        unpack(torch.zeros(num_bytes, dtype=torch.uint8), 3, 5)


@pytest.mark.parametrize(
    ("width", "dtype"), [(1, torch.uint8), (8, torch.uint8), (9, torch.int16), (15, torch.int16), (16, torch.int32)]
)
def test_codes_wait_in_the_fewest_bytes(width: int, dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1], [2**width - 1, 2 ** (width - 1)]], dtype=torch.int32)
    held = narrowest(values, width)
    assert held.dtype == dtype
    assert held.tolist() == values.tolist()
    assert torch.equal(pack(held.flatten(), width), pack(values.flatten(), width))
