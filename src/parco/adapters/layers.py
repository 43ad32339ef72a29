"""What stands beside a layer: the adapters' own modules, which own their parameters under stable names.

Every one of them computes `around(x, layer, product, share)`: what the layer gives for x [M, K] with the adapter, where
`product(x)` is what it gives without, [M, N] in memory of its own. They nest, so several adapters add up.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parco.adapters.methods import Bottleneck, DoRA, Factors, LoRA, Method, VeRA
from parco.adapters.product import with_factors
from parco.kernels.activations import ACTIVATIONS
from parco.nn import StoredWeight
from parco.nn.linear import Linear
from parco.nn.parts import rows as dense_rows
from parco.nn.parts import shape

Product = Callable[[Tensor], Tensor]


class Adapter(nn.Module, abc.ABC):
    """One adapter of one layer. `method` is what it was made by, with the rank and alpha of this layer; None where it
    is a copy of a module.
    """

    method: Any

    additive = True
    """Whether it adds to the layer's output something that its share scales, so that shares of several make sense."""

    @abc.abstractmethod
    def around(self, x: Tensor, layer: Any, product: Product, share: float) -> Tensor:
        """The layer's output [M, N] for x [M, K] with this adapter, `share` of it where that makes sense."""

    def merged(self, layer: Any) -> Tensor:
        """[N, K] in fp32 (fp64 where the layer's is): the matrix that computes what layer and adapter do together.
        TypeError where there is none.
        """
        raise TypeError(f"{self.method} has no matrix")

    def extra_repr(self) -> str:
        return str(self.method)


class LowRank(Adapter):
    """LoRA: `lora_A` [r, K] and `lora_B` [N, r]."""

    def __init__(self, method: Factors, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.method = method
        outputs, columns = shape(layer)
        self.lora_A = nn.Parameter(torch.empty(method.rank, columns, dtype=dtype, device=layer.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, method.rank, dtype=dtype, device=layer.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def around(self, x: Tensor, layer: Any, product: Product, share: float) -> Tensor:
        p = self.method.dropout if self.training else 0.0
        return with_factors(product, x, self.lora_A, self.lora_B, self.method.scale * share, p)

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        """(left [N, r], right [r, K]): what is added to the matrix is their product."""
        return self.method.scale * self.lora_B.detach(), self.lora_A.detach()

    def merged(self, layer: Any) -> Tensor:
        return _plus(layer, *self.factors(layer))


class WeightDecomposed(LowRank):
    """DoRA: `magnitude` [N] beside LoRA's two."""

    additive = False

    def __init__(self, method: DoRA, layer: Any, dtype: torch.dtype) -> None:
        super().__init__(method, layer, dtype)
        self.magnitude = nn.Parameter(torch.empty(shape(layer)[0], dtype=dtype, device=layer.weight.device))
        self.reset_magnitude(layer)

    @torch.no_grad()
    def reset_magnitude(self, layer: Any) -> None:
        """The norms of the rows that the layer's matrix and the factors make now."""
        self.magnitude.copy_(self._norm(layer))

    def around(self, x: Tensor, layer: Any, product: Product, share: float) -> Tensor:
        if share != 1:
            raise ValueError(f"{self.method}: a share of {share:g} of it means nothing; 1 is what it can have")
        y = super().around(x, layer, product, 1.0)
        wide = torch.promote_types(self.magnitude.dtype, torch.float32)
        # In 16 bits the factor itself, near 1, would not move by less than half a percent.
        excess = (self.magnitude.to(wide) / self._norm(layer).to(wide) - 1).to(y.dtype)
        return torch.addcmul(y, y if layer.bias is None else y - layer.bias.to(y.dtype), excess)

    def merged(self, layer: Any) -> Tensor:
        whole = super().merged(layer)
        return whole * (self.magnitude.detach().to(whole.dtype) / whole.norm(dim=1))[:, None]

    @torch.no_grad()
    def _norm(self, layer: Any) -> Tensor:
        """[N] norms of the rows of W + s·B·A in the factors' dtype, without that sum: its squares are ‖w‖² + 2s·b·(Aw)
        + s²·bᵀ(AAᵀ)b.
        """
        a, b = self.lora_A, self.lora_B
        s = self.method.scale
        with torch.autocast(a.device.type, enabled=False):
            if isinstance(layer, Linear):
                squares, mixed = _squares(layer.weight).to(a.dtype), layer.weight(a).t()
            else:
                weight = dense_rows(layer).to(a.dtype)
                squares, mixed = weight.square().sum(1), weight @ a.t()
            total = squares + (b * (2 * s * mixed + s * s * (b @ (a @ a.t())))).sum(1)
        return total.clamp_(min=torch.finfo(a.dtype).tiny).sqrt()


class Projections(nn.Module):
    """VeRA's random factors, `vera_A` [r, ≥K] and `vera_B` [≥N, r]: one module in all adapters, so that they stay one
    tensor each when the model is moved or cast.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("vera_A", a, persistent=False)
        self.register_buffer("vera_B", b, persistent=False)

    def on(self, device: torch.device) -> Projections:
        """These where they are on `device`; copies of them, which that layer has alone, elsewhere."""
        a, b = self.vera_A, self.vera_B
        return self if a.device == device else Projections(a.to(device), b.to(device))


class VectorBased(Adapter):
    """VeRA: `vera_lambda_b` [N] and `vera_lambda_d` [r], beside the projections of all layers."""

    def __init__(self, method: VeRA, layer: Any, dtype: torch.dtype, shared: Projections) -> None:
        super().__init__()
        self.method = method
        device = layer.weight.device
        self.shared = shared.on(device)
        self.vera_lambda_b = nn.Parameter(torch.zeros(shape(layer)[0], dtype=dtype, device=device))
        self.vera_lambda_d = nn.Parameter(torch.full((method.rank,), method.initial, dtype=dtype, device=device))

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        """(left [N, r], right [r, K]): what is added to the matrix is their product."""
        outputs, columns = shape(layer)
        d, b = self.vera_lambda_d[:, None], self.vera_lambda_b[:, None]
        return b * self.shared.vera_B[:outputs], d * self.shared.vera_A[:, :columns]

    def around(self, x: Tensor, layer: Any, product: Product, share: float) -> Tensor:
        b, a = self.factors(layer)
        return with_factors(product, x, a, b, share, self.method.dropout if self.training else 0.0)

    def merged(self, layer: Any) -> Tensor:
        return _plus(layer, *self.factors(layer))


class Narrow(Adapter):
    """Bottleneck: `down` [width, ·] and `up` [N, width] with their biases."""

    def __init__(self, method: Bottleneck, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.method = method
        outputs, columns = shape(layer)
        read = outputs if method.placement == "serial" else columns
        device = layer.weight.device
        self.down = nn.Linear(read, method.width, dtype=dtype, device=device)
        self.up = nn.Linear(method.width, outputs, dtype=dtype, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def around(self, x: Tensor, layer: Any, product: Product, share: float) -> Tensor:
        y = product(x)
        z = x if self.method.placement == "parallel" else y
        z = functional.dropout(z, self.method.dropout, self.training)
        down, up = self.down, self.up
        inner = functional.linear(z, down.weight.to(z.dtype), down.bias.to(z.dtype))
        inner = ACTIVATIONS[self.method.activation](inner)
        added = functional.linear(inner, up.weight.to(y.dtype), up.bias.to(y.dtype))
        return torch.add(y, added, alpha=self.method.factor * share)


class Whole(Adapter):
    """A module of which an adapter has a copy of its own, trained whole: PEFT's `modules_to_save`."""

    additive = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.method = None
        self.module = module

    def around(self, x: Tensor, layer: Any, product: Product, share: float) -> Tensor:
        return self.module(x)


_MADE: dict[type[Method], type[Any]] = {LoRA: LowRank, DoRA: WeightDecomposed, Bottleneck: Narrow}


def make(method: Method, layer: Any, dtype: torch.dtype, shared: Projections | None = None) -> Adapter:
    """The adapter of one layer. `shared` is VeRA's A and B."""
    if isinstance(method, VeRA):
        assert shared is not None
        return VectorBased(method, layer, dtype, shared)
    return _MADE[type(method)](method, layer, dtype)


def of_layer(method: Method, rank: int | None, alpha: float | None) -> Method:
    """`method` with the rank and alpha that a layer has of its own, None where it has none. Without an alpha that of a
    rank of its own is the method's, as in PEFT.
    """
    if not isinstance(method, Factors):
        return method
    whole = method.rank if method.alpha is None else method.alpha
    return dataclasses.replace(
        method, rank=method.rank if rank is None else rank, alpha=whole if alpha is None else alpha
    )


def matrix(layer: Any) -> Tensor:
    """The layer's own matrix [N, K] in fp32 (fp64 where it is), decoded where it is stored."""
    if isinstance(layer.weight, StoredWeight):
        return layer.weight.dense().detach()
    weight = dense_rows(layer).detach()
    return weight if weight.dtype == torch.float64 else weight.float()


def put_(module: Any, stored: StoredWeight) -> None:
    """The layer's weight is `stored` from now on, packed where the former one was, and multiplied by as that was where
    some part of it still can be.
    """
    former: StoredWeight = module.weight
    if former.is_packed:
        stored.pack_()
    if stored.spec.takes(former.product):
        stored.product = former.product
    module.weight = stored


def _plus(layer: Any, left: Tensor, right: Tensor) -> Tensor:
    """The layer's matrix and the product of the factors."""
    whole = matrix(layer)
    return whole + left.detach().to(whole.dtype) @ right.detach().to(whole.dtype)


def _squares(weight: StoredWeight) -> Tensor:
    """[N] fp32: the sum of squares of each row of a stored weight. It does not train, so it is found once and kept."""
    found: tuple[Any, Tensor] | None = weight.__dict__.get("_row_squares")
    seen = [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in weight.tensors()]
    if found is None or found[0] != seen or found[1].device != weight.device:
        found = weight.__dict__["_row_squares"] = (seen, weight.dense().square().sum(1))
    return found[1]
