"""AdamW in one pass over memory, with fp32 or 8-bit states, for fp32 and bf16 parameters.

The update is computed in fp32 whatever a parameter's dtype; a bf16 parameter is then rounded stochastically, without
which most steps of late training would round to nothing. All parameters of a group go through one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from parco.kernels.optimizer import ROUNDINGS, adamw, decode_moment, encode_moment, scale_shape, shape_in_rows

States = Literal["fp32", "8bit"]
STATES: tuple[States, ...] = get_args(States)

LEAST_CODED = 4096
"""Numbers of the smallest parameter that gets 8-bit states."""

_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""The moments by their names in PyTorch's state, and whether they have signs."""

_AS_PYTORCH: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""What groups of torch.optim.AdamW say besides: kept in ours, so that either loads the other's."""


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's steps (arXiv 1711.05101), in one pass over each parameter; see
    `parco.kernels.optimizer.adamw` for the formula.

    Parameters are fp32 or bf16. `states="fp32"` keeps both moments in fp32 whatever the parameter's dtype; `"8bit"`
    keeps them as `parco.kernels.optimizer.states` says, in a quarter of the bytes, for parameters of at least two
    dimensions and 4,096 numbers, and in fp32 for the others. `rounding` is that of bf16 parameters: "stochastic", by
    random bits that are a function of `seed`, the step, the parameter's place in the groups and a number's place in the
    parameter, so that neither threads nor ranks nor a resume change them; or "nearest". Each group may have its own
    `lr`, `betas`, `eps`, `weight_decay`, `states`, `rounding`; `lr` may be a tensor.

    `state_dict` is that of torch.optim.AdamW where states are fp32, and either loads the other's; with 8 bits
    `exp_avg_codes`, `exp_avg_scale` and the same of `exp_avg_sq` take the moments' place. What is loaded says which
    states and rounding go on. GradScaler's factor is taken off within the pass, and a step with infinities is skipped
    and not counted; an own `grad_scale`, a number or a tensor that all gradients are divided by, clips them there too.

    Raises ValueError for arguments out of range, sparse gradients, and 8-bit states of a DTensor that is not sharded
    along its first dimension; TypeError for parameters of other dtypes.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: States = "fp32",
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
    ) -> None:
        own: dict[str, Any] = {"states": states, "rounding": rounding, "seed": seed}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | own | _AS_PYTORCH)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every parameter that has a gradient; returns what `closure` does, called with gradients on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) > 0:
            return loss
        factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        number = 0
        for group in self.param_groups:
            together: dict[tuple[bool, torch.device], list[tuple[int, Tensor]]] = {}
            for i, p in enumerate(group["params"], number):
                if p.grad is not None:
                    together.setdefault((_is_coded(group, p), p.device), []).append((i, p))
            number += len(group["params"])
            for (coded, _), members in together.items():
                self._update(group, members, coded, factor)
        return loss

    def _update(self, group: dict[str, Any], members: list[tuple[int, Tensor]], coded: bool, factor: float) -> None:
        names = [f"{name}_{part}" for name in _MOMENTS for part in ("codes", "scale")] if coded else list(_MOMENTS)
        for _, p in members:
            assert p.grad is not None
            if p.grad.layout != torch.strided:
                raise ValueError(f"AdamW: a gradient is {p.grad.layout}; dense ones are needed (sparse=False)")
            if not self.state[p]:
                self.state[p].update({"step": torch.tensor(0.0)} | _first_states(p, coded))
        found = [self.state[p] for _, p in members]
        held = {name: [_local(state[name]) for state in found] for name in names}
        moments = [held[name] for name in names]
        firsts, first_scales, seconds, second_scales = moments if coded else (moments[0], [], moments[1], [])
        adamw(
            [_local(p) for _, p in members],
            [_local(p.grad) for _, p in members if p.grad is not None],
            firsts,
            seconds,
            first_scales,
            second_scales,
            steps=[int(state["step"].item()) + 1 for state in found],
            offsets=[_first_number(p) for _, p in members],
            numbers=[number for number, _ in members],
            lr=float(group["lr"]),
            betas=group["betas"],
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            grad_factor=factor,
            rounding=group["rounding"],
            seed=group["seed"],
        )
        for state in found:
            state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state_dict of this class or of torch.optim.AdamW (or Adam). ValueError for amsgrad and whatever else this
        class does not do.
        """
        # PyTorch casts states to their parameter's dtype, unless it does not know them for tensors.
        handle = self.register_load_state_dict_pre_hook(_hold)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            _check_group(group)
            for p in group["params"]:
                if self.state.get(p):
                    self.state[p] = _settled(self.state[p], p, _is_coded(group, p))


def _is_coded(group: dict[str, Any], p: Tensor) -> bool:
    """Whether a parameter's states have 8 bits."""
    return group["states"] == "8bit" and p.ndim >= 2 and p.numel() >= LEAST_CODED


def _check_group(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], tuple(group["betas"])
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: lr is a tensor of {lr.numel()} numbers; one is needed")
    for name, value in (("lr", lr), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"AdamW: {name}={value}; at least 0 is needed")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"AdamW: betas={betas}; two numbers in [0, 1) are needed")
    group["betas"] = float(betas[0]), float(betas[1])
    for name, known in (("states", STATES), ("rounding", ROUNDINGS)):
        if group[name] not in known:
            raise ValueError(f"AdamW: {name}={group[name]!r}; one of {', '.join(known)} is needed")
    if not 0 <= group["seed"] < 1 << 64:
        raise ValueError(f"AdamW: seed={group['seed']}; it must lie in [0, 2**64)")
    for name in ("amsgrad", "maximize", "differentiable"):
        if group[name]:
            raise ValueError(f"AdamW: {name}={group[name]} is not supported; torch.optim.AdamW is needed for it")
    if not group["decoupled_weight_decay"]:
        if group["weight_decay"]:
            raise ValueError(
                f"AdamW: weight_decay={group['weight_decay']} of Adam, which adds it to gradients; 0 is needed"
            )
        group["decoupled_weight_decay"] = True
    for i, p in enumerate(group["params"]):
        if p.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"AdamW: parameter {i} of a group is {p.dtype}; float32 or bfloat16 is needed")
        if _is_coded(group, p):
            _check_shards(p)


def _is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor; asked this way because importing the class takes a second."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if _is_distributed(tensor) else tensor


def _check_shards(p: Any) -> None:
    if _is_distributed(p) and not all(place.is_shard(0) or place.is_replicate() for place in p.placements):
        raise ValueError(f"AdamW: 8-bit states need whole rows, and a parameter lies as {p.placements}: states='fp32'")


def _first_number(p: Any) -> int:
    """The place in the whole parameter of the first number that this rank holds, where that is whole rows."""
    if not _is_distributed(p):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return sum(place * step for place, step in zip(offset, torch.empty(p.shape, device="meta").stride(), strict=True))


def _first_states(p: Tensor, coded: bool) -> dict[str, Tensor]:
    if not coded:
        return {name: torch.zeros_like(p, dtype=torch.float32) for name in _MOMENTS}
    states: dict[str, Tensor] = {}
    for name in _MOMENTS:
        states[f"{name}_codes"] = torch.zeros_like(p, dtype=torch.uint8)
        scale = torch.zeros(scale_shape(_local(p)), dtype=torch.float32, device=_local(p).device)
        states[f"{name}_scale"] = _placed_as(p, scale, scale_shape(p))
    return states


def _placed_as(p: Any, local: Tensor, shape: tuple[int, int]) -> Tensor:
    """This rank's rows of a tensor of that shape, of which each has those that it has of `p`."""
    if not _is_distributed(p):
        return local
    return type(p.detach()).from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )


@dataclass(frozen=True)
class _Held:
    tensor: Tensor


def _hold(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same with its states' tensors in a case."""
    states: Mapping[Any, dict[str, Any]] = state_dict["state"]
    held = {
        key: {name: _Held(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for key, state in states.items()
    }
    return state_dict | {"state": held}


def _settled(state: dict[str, Any], p: Tensor, coded: bool) -> dict[str, Any]:
    """A loaded state as this optimizer keeps it: on the parameter's device, moments in fp32 or 8 bits."""
    state = {name: value.tensor if isinstance(value, _Held) else value for name, value in state.items()}
    if "max_exp_avg_sq" in state:
        raise ValueError("AdamW: the loaded state has max_exp_avg_sq, of amsgrad, which is not supported")
    found: dict[str, Any] = {"step": torch.tensor(float(state["step"]))}
    for name, has_sign in _MOMENTS.items():
        moment: Any = state.get(name)
        parts: dict[str, Any] = {key: state.get(key) for key in (f"{name}_codes", f"{name}_scale")}
        if moment is None and None in parts.values():
            raise ValueError(f"AdamW: a loaded state has {', '.join(state)}; {name} is needed")
        if coded:
            parts = dict(zip(parts, _encoded(p, moment, has_sign), strict=True)) if moment is not None else parts
            found |= {key: part.to(p.device) for key, part in parts.items()}
        else:
            moment = _decoded(p, parts, has_sign) if moment is None else moment
            found[name] = moment.to(p.device, torch.float32)
    return found


def _encoded(p: Tensor, moment: Any, has_sign: bool) -> tuple[Tensor, Tensor]:
    local = _local(moment).to(torch.float32)
    codes, scale = encode_moment(local.reshape(shape_in_rows(local)), has_sign)
    return _like(p, codes.reshape(local.shape)), _placed_as(p, scale, scale_shape(p))


def _decoded(p: Tensor, parts: dict[str, Any], has_sign: bool) -> Tensor:
    codes, scale = parts.values()
    local = _local(codes)
    return _like(p, decode_moment(local.reshape(shape_in_rows(local)), _local(scale), has_sign).reshape(local.shape))


def _like(p: Tensor, local: Tensor) -> Tensor:
    """This rank's part of a tensor that lies as `p` does."""
    whole = torch.zeros_like(p, dtype=local.dtype)
    _local(whole).copy_(local)
    return whole
