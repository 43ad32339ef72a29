import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parco.kernels.cast import pack, unpack


@given(bits=st.integers(1, 8), columns=st.integers(1, 70), rows=st.integers(0, 4))
def test_a_row_is_a_stream_of_bits_lowest_first(bits, columns, rows):
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert packed.is_contiguous()
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * index) for index, code in enumerate(row))
        assert bytes(stream) == number.to_bytes(len(stream), "little")
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_four_bits_take_the_low_nibble_first():
    assert pack(torch.tensor([[0x1, 0xA, 0x7]], dtype=torch.uint8), 4).tolist() == [[0xA1, 0x07]]


@pytest.mark.parametrize("bits", [3, 4])
def test_layouts(bits):
    codes = torch.randint(0, 1 << bits, (33, 20), dtype=torch.uint8)
    assert torch.equal(pack(codes.t(), bits), pack(codes.t().contiguous(), bits))
    packed = pack(codes, bits)
    wide = torch.cat([packed, packed], 1)[:, : packed.shape[1]]
    assert torch.equal(unpack(wide, bits, 20), codes)


@pytest.mark.parametrize("bits", [0, 9])
def test_refused_widths(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits={bits}"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), bits, 1)
