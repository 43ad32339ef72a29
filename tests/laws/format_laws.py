"""The laws of a Format. A test class inherits them and supplies the fixture `format`:

    class TestMine(FormatLaws):
        @pytest.fixture
        def format(self):
            return formats.parse("int4:32")

A new element or block that `formats.NAMES` mentions is checked by these without a further line. A new Scale also needs
a branch in `scale_of_each`, which is written apart from the implementation.
"""

import math

import pytest
import torch

from parco import formats
from parco.formats import Format, Integer, ScaleAbsmean, ScaleDelayed, ScaleE4M3, ScaleE8M0
from parco.kernels.cast import ROUNDINGS, decode, decode_tensors, encode, tiles

SHAPE = (37, 151)
ULP = 2.0**-22
"""Of one division and one product in fp32 (2**-24 each), doubled."""


def sample(shape=SHAPE, spread=2.0):
    """Numbers whose magnitude differs from block to block, with zeros and outliers among them."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape[0], 1, generator=generator))
    x[..., 5] *= 30
    x[..., 7] = 0
    return x


def given_scales(format: Format, x):
    """What `encode` needs besides `x`: a delayed scale comes from outside, such that some numbers saturate."""
    if isinstance(format.scale, ScaleDelayed):
        return {"scale": (x.abs().amax() / format.element.max / 4).reshape(1, 1)}
    return {}


def scale_of_each(format: Format, tensors, shape):
    """fp32 scale of every element, spread here by index arithmetic, apart from the implementation's tiles."""
    if "scale" not in tensors:
        return torch.ones(shape)
    scale = tensors["scale"]
    if isinstance(format.scale, ScaleE8M0):
        scale = torch.where(scale == 255, torch.nan, torch.exp2(scale.to(torch.float64) - 127)).to(torch.float32)
    elif isinstance(format.scale, ScaleE4M3):
        scale = scale.view(torch.float8_e4m3fn).to(torch.float32) * tensors["global_scale"]
    return spread_blocks(format, scale.to(torch.float32), shape)


def spread_blocks(format: Format, scale, shape):
    rows = torch.arange(shape[0]) // (format.block.rows or shape[0])
    columns = torch.arange(shape[1]) // (format.block.columns or shape[1])
    return scale[rows[:, None], columns[None, :]]


def numbers(format: Format, tensors, shape):
    """All numbers that each element could have become: [N, K, codes], ascending, fp32."""
    element = format.element
    if isinstance(element, Integer):
        if format.is_asymmetric:
            codes = torch.arange(element.codes, dtype=torch.float32)
            candidates = codes - spread_blocks(format, tensors["zero"].to(torch.float32), shape)[..., None]
        else:
            candidates = torch.arange(element.least, element.greatest + 1, dtype=torch.float32).expand(*shape, -1)
    else:
        values = torch.tensor(element.values())
        candidates = values[torch.isfinite(values)].sort().values.expand(*shape, -1)
    return candidates * scale_of_each(format, tensors, shape)[..., None]


class FormatLaws:
    @pytest.fixture(autouse=True)
    def _one_thread(self):
        """Tensors this small gain nothing from threads, and on a busy machine wait for them."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def test_its_text_names_it(self, format):
        assert Format.parse(str(format)) == format
        assert hash(Format.parse(str(format))) == hash(format)
        assert formats.parse(format) is format

    @pytest.mark.parametrize("shape", [SHAPE, (1, 1), (128, 256), (130, 16), (3, 129), (0, 33)])
    def test_it_describes_what_is_stored(self, format, shape):
        x = torch.randn(shape)
        encoded = encode(x, format, **given_scales(format, torch.ones(1)))
        specs = format.tensors(shape)
        assert list(encoded.tensors) == list(specs)
        assert [(tuple(t.shape), t.dtype) for t in encoded.tensors.values()] == list(specs.values())
        assert encoded.nbytes == format.nbytes(shape) == sum(t.nbytes for t in encoded.tensors.values())
        assert decode(encoded).shape == shape

    def test_it_rounds_to_the_nearest(self, format):
        x = sample()
        encoded = encode(x, format, **given_scales(format, x))
        if format.is_dense:
            assert torch.equal(encoded.tensors["values"], x.to(format.dtype))
            return
        candidates = numbers(format, encoded.tensors, SHAPE)
        error = (decode(encoded) - x).abs()
        least = (candidates - x[..., None]).abs().amin(-1)
        # What is rounded is x / scale, itself rounded in fp32: close to a midpoint either neighbour is right.
        assert (error <= least + candidates.abs().amax(-1) * ULP).all()

    def test_it_rounds_toward_zero(self, format):
        x = sample()
        encoded = encode(x, format, rounding="zero", **given_scales(format, x))
        back = decode(encoded)
        slack = (x.abs() + scale_of_each(format, encoded.tensors, SHAPE) * 256) * ULP
        assert (back.abs() <= x.abs() + slack).all()
        if format.is_dense:
            assert torch.equal(back, back.to(format.dtype).float())
            return
        candidates = numbers(format, encoded.tensors, SHAPE)
        between = (candidates.abs() > back.abs()[..., None] + slack[..., None]) & (
            candidates.abs() < x.abs()[..., None] - slack[..., None]
        )
        same_side = candidates * x[..., None] > 0
        assert not (between & same_side).any()

    def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased(self, format):
        shape, draws = (8, 48), 300
        x = sample(shape, spread=0.3)
        x[0] *= 1e-3  # among the subnormals of small floats
        encoded = encode(x, format, **given_scales(format, x))
        # Every draw has its own rows, hence its own bits, and the same blocks, hence the same scales.
        stacked = encode(x.repeat(draws, 1), format, rounding="stochastic", seed=5, **given_scales(format, x))
        drawn = decode(stacked).reshape(draws, *shape).to(torch.float64)
        if format.is_dense:
            below, above = x.to(format.dtype).to(torch.float64), x.to(format.dtype).to(torch.float64)
            spacing = x.abs().clamp(min=torch.finfo(format.dtype).smallest_normal) * torch.finfo(format.dtype).eps
            low, high = below - spacing, above + spacing
        else:
            candidates = numbers(format, encoded.tensors, shape).to(torch.float64)
            x64 = x.to(torch.float64)[..., None]
            low = torch.where(candidates <= x64, candidates, -torch.inf).amax(-1)
            high = torch.where(candidates >= x64, candidates, torch.inf).amin(-1)
            low = torch.where(torch.isfinite(low), low, candidates[..., 0])
            high = torch.where(torch.isfinite(high), high, candidates[..., -1])
        slack = x.abs().to(torch.float64) * ULP + 1e-30
        assert (drawn >= low - slack).all()
        assert (drawn <= high + slack).all()
        # Where x lies within the range, the mean of n draws between numbers a width apart is off by more than
        # 5.5 * width / (2 sqrt(n)) with a probability of 4e-8 at most, for each of 384 elements.
        within = (low <= x) & (x <= high)
        bias = (drawn.mean(0) - x).abs()
        assert (bias <= (high - low) * 5.5 / (2 * math.sqrt(draws)) + slack)[within].all()

    def test_threads_change_nothing(self, format):
        x = sample((70, 520))  # above the size from which torch uses threads
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(encode(x, format, rounding="stochastic", seed=3, **given_scales(format, x)))
        for name, tensor in results[0].tensors.items():
            assert torch.equal(tensor, results[1].tensors[name]), name

    @pytest.mark.parametrize("rounding", ROUNDINGS)
    def test_chunks_change_nothing(self, format, rounding, monkeypatch):
        x = sample((140, 50))
        whole = encode(x, format, rounding=rounding, seed=3, **given_scales(format, x))
        monkeypatch.setattr(tiles, "CHUNK_ELEMENTS", 1000)
        parts = encode(x, format, rounding=rounding, seed=3, **given_scales(format, x))
        for name, tensor in whole.tensors.items():
            if isinstance(format.scale, ScaleAbsmean) and name == "scale":  # a mean in fp64, added up in another order
                torch.testing.assert_close(parts.tensors[name], tensor, rtol=1e-6, atol=0)
            else:
                assert torch.equal(parts.tensors[name], tensor), name

    def test_encoding_again_changes_nothing(self, format):
        x = sample()
        first = encode(x, format, **given_scales(format, x))
        given = {name: first.tensors[name] for name in ("scale", "zero", "global_scale") if name in first.tensors}
        again = encode(decode(first), format, **given)
        for name, tensor in first.tensors.items():
            assert torch.equal(tensor, again.tensors[name]), name

    def test_zero_is_zero(self, format):
        x = torch.zeros(SHAPE)
        assert torch.equal(decode(encode(x, format, **given_scales(format, torch.ones(1)))), x)

    def test_infinity_saturates(self, format):
        x = sample((3, 256))
        given = given_scales(format, x)
        clean = decode(encode(x, format, **given))
        x[2, 200] = torch.inf
        back = decode(encode(x, format, **given))
        assert back[2, 200] >= clean[2].abs().max()
        assert not torch.isnan(back).any()

    def test_nan_stays_in_its_block(self, format):
        shape = (3, 256)
        x = sample(shape)
        given = given_scales(format, x)
        clean = encode(x, format, **given)
        x[0, 3] = torch.nan
        encoded = encode(x, format, **given)
        back = decode(encoded)
        elsewhere = torch.ones(shape, dtype=torch.bool)
        elsewhere[0, 3] = False
        if "scale" in clean.tensors:
            counts = format.block.counts(shape)
            block = spread_blocks(format, torch.arange(math.prod(counts)).reshape(counts), shape)
            elsewhere = block != block[0, 3]
            assert torch.isnan(back[~elsewhere]).all()
        elif format.element.special == "none":
            assert back[0, 3] == format.element.max  # there is no NaN to become
        else:
            assert torch.isnan(back[0, 3])
        assert not torch.isnan(back[elsewhere]).any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes_are_read_as_fp32(self, format, dtype):
        x = sample((5, 64), spread=0.5).to(dtype)
        expected = encode(x.to(torch.float32), format, **given_scales(format, x.float()))
        encoded = encode(x, format, **given_scales(format, x.float()))
        for name, tensor in encoded.tensors.items():
            assert torch.equal(tensor, expected.tensors[name]), name
        assert decode(encoded, dtype).dtype == dtype
        assert torch.equal(decode(encoded, dtype), decode(encoded).to(dtype))

    def test_layout_and_leading_dimensions_change_nothing(self, format):
        x = sample((12, 96))
        given = given_scales(format, x)
        expected = encode(x, format, **given)
        for view in (x.reshape(3, 4, 96), x.t().contiguous().t(), torch.cat([x, x], 1)[:, :96]):
            encoded = encode(view, format, **given)
            assert encoded.shape == tuple(view.shape)
            for name, tensor in encoded.tensors.items():
                assert torch.equal(tensor, expected.tensors[name]), name
            assert torch.equal(decode(encoded), decode(expected).reshape(view.shape))
        assert decode(encode(x[0], format, **given)).shape == (96,)

    def test_rows_are_apart(self, format):
        if format.block.rows != 1 or isinstance(format.scale, ScaleE4M3 | ScaleAbsmean):
            pytest.skip("rows share a scale")
        x = sample()
        whole, part = encode(x, format), encode(x[11:20], format)
        for name, tensor in part.tensors.items():
            assert torch.equal(tensor, whole.tensors[name][11:20]), name

    def test_it_runs_on_the_meta_device(self, format):
        tensors = {n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in format.tensors(SHAPE).items()}
        back = decode_tensors(format, SHAPE, tensors, torch.bfloat16)
        assert (back.device.type, back.shape, back.dtype) == ("meta", SHAPE, torch.bfloat16)

    def test_a_wrong_tensor_is_named(self, format):
        encoded = encode(torch.ones(SHAPE), format, **given_scales(format, torch.ones(1)))
        for name in encoded.tensors:
            rest = {other: tensor for other, tensor in encoded.tensors.items() if other != name}
            with pytest.raises(ValueError, match=f"{name!r}.*missing"):
                decode_tensors(format, SHAPE, rest)
            with pytest.raises(ValueError, match=f"{name!r} is .* needs"):
                decode_tensors(format, SHAPE, {**rest, name: encoded.tensors[name].to(torch.int64)})
