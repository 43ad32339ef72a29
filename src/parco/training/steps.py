"""How often weights have changed: what an encoding of a weight that is kept between uses has to be compared with.

A tensor's `_version` does not say it alone: PyTorch's fused optimizers write without moving it.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


def optimizer_steps() -> int:
    """The steps that all optimizers of this process together have taken since parco.training was imported."""
    return _steps


def weight_state(weight: Tensor) -> tuple[int, int, int]:
    """What stays equal only as long as nothing has written to `weight`: no optimizer's step, no operation in place, no
    other memory. What is written through `weight.data` or from outside PyTorch does not show.
    """
    return _steps, weight._version, weight.data_ptr()  # pyright: ignore[reportPrivateUsage]
