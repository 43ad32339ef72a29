import pytest
import torch

from parco.formats import E4M3
from parco.kernels.cast import DelayedScaling, decode, encode


def run(amaxes, **options):
    state = DelayedScaling.start(options.pop("length", 4))
    scales = []
    for amax in amaxes:
        state = state.update(torch.tensor(amax), E4M3, **options)
        scales.append(state.scale.item() * 448)
    return state, scales


def test_the_greatest_of_the_history_counts():
    # A history of four: 8 counts in its own step and in the three that follow.
    _, scales = run([8.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    assert scales == pytest.approx([8, 8, 8, 8, 2, 1])


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_an_unusable_history_keeps_the_scale(bad):
    _, scales = run([bad, bad], length=1)
    assert scales == pytest.approx([448, 448])
    _, scales = run([3.0, bad, 5.0], length=1)
    assert scales == pytest.approx([3, 3, 5])


def test_margin():
    _, scales = run([3.0], margin=2)
    assert scales == pytest.approx([12])


def test_the_state_is_not_changed_in_place():
    state = DelayedScaling.start(4)
    state.update(torch.tensor(3.0), E4M3)
    assert state.scale.item() == 1
    assert not state.history.any()


def test_encode_takes_the_scale_and_saturates():
    state = DelayedScaling.start(8).update(torch.tensor(2.0), E4M3)
    x = torch.tensor([[2.0, -1.0, 5.0]])
    back = decode(encode(x, "fp8_e4m3:tensor:delayed", scale=state.scale))
    torch.testing.assert_close(back, torch.tensor([[2.0, -1.0, 2.0]]))


def test_refused_length():
    with pytest.raises(ValueError, match="length=0"):
        DelayedScaling.start(0)
