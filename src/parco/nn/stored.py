"""A module that owns the tensors of a Weight.

The tensors are registered Parameters under the names that the Weight gives them, one submodule per part (`left.codes`
is the parameter `codes` of the submodule `left`), so everything that walks modules works: state_dict, safetensors,
`.to(device)`, deepcopy, sharding, `torch.compile`. One thing is different on purpose: a change of dtype changes what is
computed, not what is stored. `.to(torch.bfloat16)` on a model must not rewrite the fp32 scales of its integer weights.

On a CPU the tensors may be packed (`pack_`): laid out as kernels read them. State dicts hold them by rows all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch

from parco.nn.shared import Narrow, multiply
from parco.products import Native, Product
from parco.weights import LowRank, Shared, Weight


class StoredWeight(torch.nn.Module):
    """The tensors of `spec`, in the order of `spec.tensors()`, and the dtype and the Product in which they are used.

    Model code that reads `layer.weight.shape`, `.dtype`, `.device` or `.requires_grad` of a plain layer finds them
    here: the matrix's shape, the compute dtype, the device, and whether anything trains.
    """

    spec: Weight
    _product: Product = Native()

    # Transformers' initialisers skip what carries this mark, so that they never touch codes and scales.
    _is_hf_initialized = True

    def __init__(self, spec: Weight, tensors: Sequence[torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Raises ValueError where a tensor's shape or dtype is not what `spec` says, or where their number differs."""
        super().__init__()
        self.spec = spec
        self._compute_dtype = dtype
        self._packed = False
        self._has_basis = isinstance(spec, LowRank) and isinstance(spec.right, Shared)
        if isinstance(spec, Shared):
            self.narrow = Narrow()
        expected = spec.tensors()
        if len(tensors) != len(expected):
            raise ValueError(
                f"{spec} takes the {len(expected)} tensors {', '.join(expected)}; {len(tensors)} are given"
            )
        for (name, wanted), tensor in zip(expected.items(), tensors, strict=True):
            if tuple(tensor.shape) != wanted.shape or tensor.dtype != wanted.dtype:
                raise ValueError(
                    f"{spec}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}; "
                    f"it must be {wanted.dtype} {wanted.shape}"
                )
        parts = spec.parts()
        if not parts:
            for name, tensor in zip(expected, tensors, strict=True):
                self.register_parameter(name, _parameter(tensor))
        start = 0
        for name, part in parts.items():
            stop = start + len(part.tensors())
            self.add_module(name, StoredWeight(part, tensors[start:stop], dtype))
            start = stop
        assert not parts or start == len(tensors), f"{spec} names tensors that belong to none of its parts"

    @classmethod
    def empty(
        cls, spec: Weight, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> StoredWeight:
        """Uninitialised tensors for `spec`, to be loaded into; on device "meta" they take no memory."""
        return cls(spec, [torch.empty(t.shape, dtype=t.dtype, device=device) for t in spec.tensors().values()], dtype)

    @classmethod
    def encode(cls, spec: Weight, matrix: torch.Tensor, dtype: torch.dtype | None = None) -> StoredWeight:
        """`matrix` [N, K] stored as `spec` says, rounded to nearest; computes in `dtype`, by default the matrix's
        own. Raises TypeError for a composite, ValueError for another shape.
        """
        return cls(spec, spec.encode(matrix), dtype or matrix.dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The stored tensors in the order of `spec.tensors()`."""
        if not self._modules:
            return tuple(self._parameters.values())  # pyright: ignore[reportReturnType]
        found: tuple[torch.Tensor, ...] = ()
        for part in self._modules.values():
            found += part.tensors()  # pyright: ignore
        return found

    @property
    def is_packed(self) -> bool:
        """Whether `pack_` has laid out the tensors, of every part where there are some."""
        parts = [part for part in self._modules.values() if isinstance(part, StoredWeight)]
        return all(part.is_packed for part in parts) if parts else self._packed

    def pack_(self) -> Self:
        """Lays the tensors out as the CPU's kernels read them fastest, in place, where they are on the CPU; what holds
        views of them sees the old numbers. Undone by `unpack_`, and by a move to another device.
        """
        return self._lay_out(True)

    def unpack_(self) -> Self:
        """The tensors as the spec describes them."""
        return self._lay_out(False)

    def _lay_out(self, packed: bool) -> Self:
        for module in self.modules():
            if not isinstance(module, StoredWeight) or module._modules or module._packed == packed:
                continue
            if packed and module.device.type != "cpu":
                continue
            tensors = module.tensors()
            changed = module.spec.pack(*tensors) if packed else module.spec.unpack(*tensors)
            for parameter, tensor in zip(tensors, changed, strict=True):
                if tensor is not parameter:
                    parameter.data = tensor
            module._packed = packed
        return self

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times the matrix transposed, plus bias: [..., N] in the dtype of x."""
        if self._has_basis:
            return multiply(self, x, bias)
        return self.spec.apply(x, *self.tensors(), bias=bias, product=self._product)

    @property
    def product(self) -> Product:
        """How x is multiplied by the matrix; ValueError when it is set to one that no part of the spec takes."""
        return self._product

    @product.setter
    def product(self, product: Product) -> None:
        if not self.spec.takes(product):
            raise ValueError(f"StoredWeight.product is set to {product}; no part of {self.spec} computes by it")
        self._product = product

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix, decoded: [N, K] in `dtype`."""
        return self.spec.dense(*self.tensors(), dtype=dtype)

    @property
    def shape(self) -> torch.Size:
        """(N, K) of the matrix that is stood for."""
        return torch.Size(self.spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which rows are looked up and which model code sees; the stored dtypes are those of `spec`."""
        return self._compute_dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"StoredWeight.dtype is set to {dtype}; a compute dtype is a floating-point one")
        for module in self.modules():
            if isinstance(module, StoredWeight):
                module._compute_dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(self.parameters()).device

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors trains."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as the spec describes them, which a file has; panels of digits are larger."""
        return self.spec.nbytes

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Also what assigning a Parameter goes through: loaders hand over scales that require gradients, which only
        Dense may.
        """
        if param is not None and param.requires_grad and not self.spec.trains:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return str(self.spec) if isinstance(self._product, Native) else f"{self.spec}, {self._product}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._modules:
            for name, tensor in zip(self._parameters, self.spec.unpack(*self.tensors()), strict=True):
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *arguments: Any, **options: Any
    ) -> None:
        packed = self._packed and not self._modules
        if packed:
            self.unpack_()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments, **options)
        if packed:
            if local_metadata.get("assign_to_params_buffers", False):
                # The loaded Parameters may be another module's own, which is not to change with this one.
                for name, parameter in self._parameters.items():
                    assert parameter is not None
                    self._parameters[name] = torch.nn.Parameter(parameter.data, parameter.requires_grad)
            self.pack_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves the tensors as `fn` would and leaves their dtypes; takes the dtype to which `fn` casts as the compute
        dtype.

        `fn` sees each tensor as bytes, which a cast to a floating dtype passes over, so a move (to a device, to shared
        memory, to uninitialised memory) is all that is left of it.
        """
        probe = fn(torch.empty(0, dtype=self._compute_dtype, device="cpu"))
        cast = probe.dtype
        if probe.device.type != "cpu":
            self.unpack_()

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor.detach().view(torch.uint8))
            return moved.view(tensor.dtype) if moved.dtype == torch.uint8 else tensor.to(moved.device)

        super()._apply(move, recurse)
        if cast.is_floating_point:
            self.dtype = cast
        return self


def pack_(model: torch.nn.Module) -> None:
    """`StoredWeight.pack_` of every stored weight in `model`. Models that `convert_` made and that were loaded are
    packed.
    """
    for module in model.modules():
        if isinstance(module, StoredWeight):
            module.pack_()


@contextmanager
def packed(*models: torch.nn.Module) -> Generator[None]:
    """Packs the models' stored weights for a while; those that were not packed are as before afterwards."""
    found = [part for model in models for part in model.modules() if isinstance(part, StoredWeight)]
    plain = [part for part in found if not part.is_packed]
    try:
        for part in plain:
            part.pack_()
        yield
    finally:
        for part in plain:
            part.unpack_()


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    return torch.nn.Parameter(tensor.contiguous(), requires_grad=False)
