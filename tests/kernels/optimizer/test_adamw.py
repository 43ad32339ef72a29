"""adamw: the formula in fp64, every kernel bit for bit, stochastic rounding, 8-bit moments, odd tensors and errors."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from tests.laws.kernel_laws import KernelLaws, forget_choices
from torch import Tensor

from parco import machine
from parco.kernels import table
from parco.kernels.cast.philox import random_bits
from parco.kernels.optimizer import BLOCK, adamw, decode_moment, encode_moment, scale_shape, shape_in_rows
from parco.kernels.optimizer.adamw import drawn_bf16, stream
from parco.kernels.optimizer.states import code_values

SHAPES = [(), (7,), (256,), (1000,), (0,), (4, 0), (3, 300), (5, 16), (17, 2, 50)]
SCALARS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.1}


def usable() -> Iterator[table.Kernel]:
    for kernel in table.operations()["adamw"].kernels:
        if kernel.isa == table.TORCH or kernel.isa in machine.detect().isas:
            yield kernel


def sample(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))


def tensors(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, grad_dtype: torch.dtype, coded: bool
) -> list[list[Tensor]]:
    """params, grads, firsts, seconds, first_scales, second_scales."""
    found: list[list[Tensor]] = [[], [], [], [], [], []]
    for shape in shapes:
        param, grad, first = (sample(shape, seed) for seed in (1, 2, 3))
        lists = [param.to(dtype), grad.to(grad_dtype), first, first.square() * 0.7]
        if coded:
            rows = shape_in_rows(param)
            scales = []
            for i, has_sign in ((2, True), (3, False)):
                codes, scale = encode_moment(lists[i].reshape(rows), has_sign)
                lists[i] = codes.reshape(shape)
                scales.append(scale)
            lists += scales
        for held, tensor in zip(found, lists, strict=False):
            held.append(tensor)
    return found


def scalars(
    count: int, grad_factor: float = 1.0, rounding: str = "nearest", seed: int = 3, **changed: Any
) -> list[Any]:
    steps, offsets, numbers = [2 + i for i in range(count)], [5 * i for i in range(count)], list(range(count))
    return [steps, offsets, numbers, *(SCALARS | changed).values(), grad_factor, rounding, seed]


def copies(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in each] for each in lists]


def assert_same_bits(found: list[list[Tensor]], wanted: list[list[Tensor]], name: str) -> None:
    for a, b in zip(chain.from_iterable(found), chain.from_iterable(wanted), strict=True):
        same = a == b if a.dtype == torch.uint8 else (a == b) | (a.isnan() & b.isnan())
        assert same.all(), f"{name}: {tuple(a.shape)} {a.dtype}: {a[~same][:3]} and not {b[~same][:3]}"


@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_kernel_has_the_bits_of_the_reference(rounding: str, dtype: torch.dtype, coded: bool) -> None:
    for grad_dtype in (torch.float32, torch.bfloat16, torch.float16):
        for beta1 in (0.9, 0.3):
            lists = tensors(SHAPES, dtype, grad_dtype, coded)
            lists[1][1][2], lists[1][3][17], lists[1][6][1, 3] = torch.inf, torch.nan, -torch.inf
            others = scalars(len(SHAPES), 1 / 3, rounding, -5, beta1=beta1)
            *kernels, reference = usable()
            wanted = copies(lists)
            reference.run(*wanted, *others)
            assert not torch.equal(wanted[0][2], lists[0][2])
            for kernel in kernels:
                found = copies(lists)
                kernel.run(*found, *others)
                assert_same_bits(found, wanted, kernel.name)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_the_reference_is_the_formula_in_fp64(beta1: float) -> None:
    """Within some roundings to fp32: each of the eight operations on the way errs by 2**-24 of its result at most, and
    all results are of the magnitude of what is compared, or of what was added up to it.
    """
    (param,), (grad,), (first,), (second,), _, _ = lists = tensors([(400,)], torch.float32, torch.float32, False)
    p, g, m, v = (t.double() for t in (param, grad, first, second))
    step, (lr, _, beta2, epsilon, decay) = 2, SCALARS.values()
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    change = lr * (new_m / (1 - beta1**step)) / ((new_v / (1 - beta2**step)).sqrt() + epsilon)
    new_p = p * (1 - lr * decay) - change
    for kernel in usable():
        found = copies(lists)
        kernel.run(*found, *scalars(1, beta1=beta1))
        unit = 2.0**-24
        assert ((found[2][0].double() - new_m).abs() <= 4 * unit * (m.abs() + g.abs())).all()
        assert ((found[3][0].double() - new_v).abs() <= 4 * unit * new_v).all()
        relative = (m.abs() + g.abs()) / new_m.abs()  # what cancelled in the first moment
        assert ((found[0][0].double() - new_p).abs() <= unit * (4 * p.abs() + (12 + 4 * relative) * change.abs())).all()


def test_it_is_pytorchs_update() -> None:
    """PyTorch fuses products and sums: see the module. Compared in what the parameter has moved by."""
    lists = tensors([(3, 300)], torch.float32, torch.float32, False)
    theirs = torch.nn.Parameter(lists[0][0].clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    theirs.grad = lists[1][0] * 0.5
    optimizer.state[theirs] = {
        "step": torch.tensor(1.0),
        "exp_avg": lists[2][0].clone(),
        "exp_avg_sq": lists[3][0].clone(),
    }
    optimizer.step()
    for kernel in usable():
        found = copies(lists)
        kernel.run(*found, *scalars(1, 0.5))
        torch.testing.assert_close(found[0][0], theirs.detach(), rtol=3 * 2**-24, atol=1e-2 * 2**-20)
        torch.testing.assert_close(found[2][0], optimizer.state[theirs]["exp_avg"], rtol=2**-20, atol=1e-8)
        torch.testing.assert_close(found[3][0], optimizer.state[theirs]["exp_avg_sq"], rtol=2**-21, atol=0)


def test_stochastic_rounding_is_unbiased_and_finds_neighbours() -> None:
    """10**6 draws of each number, between subnormals too: their mean is within 4 standard deviations, which are
    sqrt(f * (1 - f) / draws) of the spacing.
    """
    draws = 10**6
    for bits in (0x3F801234, 0xC2F7FFFF, 0x7F7E8001, 0x00000001, 0x00007FFF, 0x8000C000, 0x00801000, 0x3F800000):
        x = torch.tensor([bits - (1 << 32 if bits >= 1 << 31 else 0)], dtype=torch.int32).view(torch.float32)
        random = random_bits(bits, range(7, 8), draws)[0]
        found = drawn_bf16(x.expand(draws).contiguous(), random)
        low = torch.tensor(bits >> 16 << 16, dtype=torch.int64).to(torch.int32).view(torch.float32).double()
        high = (
            torch.tensor((bits >> 16 << 16) + (1 << 16), dtype=torch.int64).to(torch.int32).view(torch.float32).double()
        )
        share = (bits & 0xFFFF) / 65536
        ups = (found.double() == high).double().mean().item()
        assert ((found.double() == low) | (found.double() == high)).all()
        assert abs(ups - share) <= 4 * (share * (1 - share) / draws) ** 0.5, hex(bits)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found = drawn_bf16(special, torch.full((3,), 0xFFFF))
    assert found.tolist()[:2] == [torch.inf, -torch.inf]
    assert found[2].isnan()


@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8bit"])
def test_a_kernel_draws_by_seed_step_number_and_place(coded: bool) -> None:
    """A parameter in two parts with offsets is the parameter; another step, number or seed draws otherwise."""
    for kernel in usable():
        lists = tensors([(6, 333)], torch.bfloat16, torch.float32, coded)
        found = copies(lists)
        kernel.run(*found, [4], [0], [9], *SCALARS.values(), 1.0, "stochastic", 11)
        parts = [[t[:2], t[2:]] for t in (tensor[0].clone() for tensor in lists if tensor)]
        parts += [[], []] if not coded else []
        kernel.run(*parts, [4, 4], [0, 2 * 333], [9, 9], *SCALARS.values(), 1.0, "stochastic", 11)
        for whole, part in zip(found, parts, strict=True):
            assert not whole or torch.equal(whole[0], torch.cat(part)), kernel.name
        for step, number, seed in ((5, 9, 11), (4, 8, 11), (4, 9, 12)):
            other = copies(lists)
            kernel.run(*other, [4], [0], [number], *SCALARS.values(), 1.0, "stochastic", seed + (step - 4 << 32))
            assert (other[0][0] != found[0][0]).double().mean() > 0.1, kernel.name
    assert stream(9, 4) == (9 << 32) + 4


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    for coded in (False, True):
        lists = tensors([(300, 700), (40,), (64, 1000), (0,), (90000,)], torch.bfloat16, torch.bfloat16, coded)
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                for kernel in usable():
                    if kernel.isa != table.TORCH:
                        results.append(copies(lists))
                        kernel.run(*results[-1], *scalars(5, rounding="stochastic"))
        finally:
            torch.set_num_threads(threads)
        for found in results[1:]:
            assert_same_bits(found, results[0], "threads")


@pytest.mark.parametrize("coded", [False, True], ids=["fp32", "8bit"])
def test_views_at_odd_places_and_strides(coded: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        lists = tensors([(37, 29)], dtype, torch.float32, coded)
        wanted = copies(lists)
        adamw_of(wanted)
        moved = []
        for each in lists:
            if each:
                memory = torch.zeros(each[0].numel() + 3, dtype=each[0].dtype)
                memory[3:] = each[0].reshape(-1)
                moved.append([memory[3:].reshape(each[0].shape)])
            else:
                moved.append([])
        adamw_of(moved)
        turned = [[t.T.contiguous().T for t in each] for each in lists]
        assert not turned[0][0].is_contiguous()
        adamw_of(turned)
        assert_same_bits(moved, wanted, "odd places")
        assert_same_bits(turned, wanted, "strides")


def adamw_of(lists: list[list[Tensor]], **changed: Any) -> None:
    options: dict[str, Any] = {"steps": [2], "offsets": [0], "numbers": [0], "lr": 1e-2, "betas": (0.9, 0.999)}
    adamw(*lists, **(options | {"epsilon": 1e-8, "weight_decay": 0.1} | changed))  # type: ignore[arg-type]


def test_versions_move() -> None:
    for dispatched in (False, True):
        lists = tensors([(3, 5)], torch.float32, torch.float32, False)
        before = [t[0]._version for t in (lists[0], lists[2])]
        with torch.set_grad_enabled(dispatched):
            adamw_of(lists)
        assert [t[0]._version for t in (lists[0], lists[2])] == [version + 1 for version in before]


@pytest.mark.parametrize("has_sign", [True, False])
def test_codes(has_sign: bool) -> None:
    """The code's numbers keep themselves; others move by at most half a step of their power of 8."""
    values = code_values(has_sign)
    magnitudes = values[:128] if has_sign else values
    assert magnitudes[0] == 0 and magnitudes[-1] == 1
    assert (magnitudes.diff() > 0).all()
    assert magnitudes[1] == 8.0 ** (-6 if has_sign else -7)
    moment = values[None] * 2.0**30 if has_sign else (values[None] * 2.0**30).square()
    codes, scale = encode_moment(moment, has_sign)
    assert scale.tolist() == [[2.0**30]]
    assert torch.equal(decode_moment(codes, scale, has_sign), moment)
    x = sample((3, 2 * BLOCK + 5)) if has_sign else sample((3, 2 * BLOCK + 5)).abs()
    codes, scale = encode_moment(x if has_sign else x.square(), has_sign)
    found = decode_moment(codes, scale, has_sign)
    found = found if has_sign else found.sqrt()
    spread_scale = scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    share = x.abs().double() / spread_scale
    place = torch.searchsorted(magnitudes.double(), share.clamp(max=1)).clamp(min=1, max=len(magnitudes) - 1)
    step = (magnitudes[place] - magnitudes[place - 1]).double()
    # Below the least number is zero, but of a code without a sign that is the least number.
    bound = torch.where(place > 1, step / 2, step)
    assert ((found.double() - x).abs() <= (bound + 2.0**-20) * spread_scale).all()
    torch.testing.assert_close(found.abs()[:, :BLOCK].amax(1), scale[:, 0], rtol=2**-22, atol=0)
    if not has_sign:
        assert (found[x > 0] > 0).all()


def test_moments_of_nothing_of_nearly_nothing_and_of_nan() -> None:
    x = torch.zeros(1, 3 * BLOCK)
    x[0, 0], x[0, BLOCK], x[0, BLOCK + 1], x[0, 2 * BLOCK] = 1e-40, 3e38, 1e-30, torch.nan
    for has_sign in (True, False):
        codes, scale = encode_moment(x, has_sign)
        found = decode_moment(codes, scale, has_sign)
        torch.testing.assert_close(found[0, BLOCK], x[0, BLOCK])
        assert scale[0, 2].isnan()
        assert found[0, 2 * BLOCK :].isnan().all()
        # A first moment of nothing is nothing; by the root of a second one the step divides.
        assert (found[0, 0], found[0, BLOCK + 1] > 0) == ((0, False) if has_sign else (x[0, 0], True))


def test_a_block_that_decays_keeps_its_codes() -> None:
    """Zero gradients for 500 steps: the second moment falls as fp32 does, which codes of their own size would not."""
    lists = tensors([(2, 300)], torch.float32, torch.float32, True)
    lists[1][0].zero_()
    codes, scale = lists[3][0].clone(), lists[5][0].clone()
    for step in range(1, 501):
        adamw_of(lists, steps=[step])
    assert torch.equal(lists[3][0], codes)
    torch.testing.assert_close(lists[5][0], scale * 0.999**250, rtol=500 * 2**-22, atol=0)


def test_wrong_arguments_are_named() -> None:
    good = tensors([(3, 5)], torch.float32, torch.float32, False)
    for position, wrong, message in (
        (0, [good[0][0].half()], r"params\[0\] is torch.float16"),
        (1, [good[1][0].to_sparse()], "dense tensor of floats"),
        (1, [good[1][0].int()], r"grads\[0\] is torch.int32"),
        (1, [good[1][0][:2]], r"\(3, 5\) is needed"),
        (2, [good[2][0].bfloat16()], r"firsts\[0\] is torch.bfloat16"),
        (3, [], "seconds has 0 members; 1"),
        (4, [torch.zeros(3, 1)], "second_scales has 0 members"),
    ):
        lists = list(good)
        lists[position] = wrong
        with pytest.raises((ValueError, TypeError), match=message):
            adamw_of(lists)
    coded = tensors([(3, 300)], torch.float32, torch.float32, True)
    assert scale_shape(coded[0][0]) == (3, 2)
    with pytest.raises(ValueError, match=r"second_scales\[0\] is torch.float32 \(3, 1\); float32 \(3, 2\)"):
        adamw_of([*coded[:5], [torch.zeros(3, 1)]])
    for changed, message in (
        ({"rounding": "zero"}, "rounding='zero'; one of nearest, stochastic"),
        ({"seed": -1}, "seed=-1"),
        ({"steps": [0]}, r"steps\[0\]=0"),
        ({"offsets": [-1]}, r"offsets\[0\]=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            adamw_of(good, **changed)


def test_a_forced_instruction_set_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARCO_ISA", "generic")
    forget_choices()
    try:
        lists = tensors([(3, 5)], torch.float32, torch.float32, False)
        (found,) = table.explain("adamw", *lists, *scalars(1))
        assert found.kernel == "adamw-generic"
    finally:
        monkeypatch.undo()
        forget_choices()


class TestAdamw(KernelLaws):
    operation = "adamw"

    @pytest.fixture(params=[False, True], ids=["fp32", "8bit"])
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        return (*tensors([(3, 300), (7,)], torch.bfloat16, torch.bfloat16, request.param), *scalars(2))

    def test_every_usable_kernel_returns_what_the_reference_does(self, call: tuple[Any, ...]) -> None:
        """It returns nothing and writes in place."""
        results = []
        for kernel in usable():
            results.append(copies(list(call[:6])))
            assert kernel.run(*results[-1], *call[6:]) is None
        for found in results[:-1]:
            assert_same_bits(found, results[-1], "kernels")
