import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parco.formats import Format
from parco.kernels.cast import decode, encode, of_bits, pack, read_codes, to_bits, unpack, write_codes

DIGITS = Format.parse("ternary5")


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


@given(columns=st.integers(1, 70), rows=st.integers(0, 4))
def test_five_digits_share_a_byte_lowest_first(columns, rows):
    codes = torch.randint(0, 3, (rows, columns), dtype=torch.uint8)
    stored = write_codes(codes, DIGITS)
    assert stored.shape == (rows, DIGITS.row_bytes(columns)) == (rows, -(-columns // 5))
    for row, found in zip(codes.tolist(), stored.tolist(), strict=True):
        assert found == [sum(c * 3**i for i, c in enumerate(row[k : k + 5])) for k in range(0, columns, 5)]
    assert torch.equal(read_codes(stored, DIGITS, columns), codes)
    # Compiled, and in plain torch on other devices.
    assert torch.equal(to_bits(stored, DIGITS, columns), pack(codes, 2))
    assert torch.equal(of_bits(pack(codes, 2), DIGITS, columns), stored)
    assert to_bits(stored.to("meta"), DIGITS, columns).shape == pack(codes, 2).shape
    assert of_bits(pack(codes, 2).to("meta"), DIGITS, columns).shape == stored.shape


def test_every_byte_stands_for_digits():
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = read_codes(every, DIGITS, 5)
    assert codes.max() == 2
    assert torch.equal(codes[243:], codes[:13])
    for columns in range(1, 6):
        assert torch.equal(to_bits(every, DIGITS, columns), pack(codes[:, :columns], 2))


@pytest.mark.parametrize("rounding", ["nearest", "zero", "stochastic"])
@pytest.mark.parametrize("block", ["", ":row", ":32", ":32x32:bf16", ":column"])
def test_five_to_a_byte_are_the_numbers_of_ternary(block, rounding):
    for shape in ((37, 151), (1, 1), (3, 64), (2, 20)):
        x = torch.randn(shape)
        five, four = (encode(x, f"{name}{block}", rounding=rounding, seed=3) for name in ("ternary5", "ternary"))
        assert torch.equal(decode(five), decode(four))
        assert torch.equal(five.tensors["scale"], four.tensors["scale"])
        assert five.tensors["codes"].shape == (shape[0], -(-shape[1] // 5))
