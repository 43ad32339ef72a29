"""The noun Recipe: how a training step computes the three products of a linear layer.

    output      = x [T, K] · W [N, K]ᵀ      summed over K
    grad_input  = g [T, N] · W [N, K]       summed over N
    grad_weight = g [T, N]ᵀ · x [T, K]      summed over T

T counts tokens. Each operand is written in a format of its own, blocks along the dimension that is summed over, and the
products of the written numbers are summed in fp32. So x and W are each encoded twice, once for either of their
products, always from their own numbers and never from one another.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parco.formats import Float, Format, ScaleDelayed, parse
from parco.kernels.cast import ROUNDINGS, Rounding
from parco.kernels.cast.hadamard import check_size

ProductName = Literal["output", "grad_input", "grad_weight"]
PRODUCTS: tuple[ProductName, ...] = ("output", "grad_input", "grad_weight")
Role = Literal["x", "weight", "grad"]
ROLES: tuple[Role, ...] = ("x", "weight", "grad")
FACTORS: dict[ProductName, tuple[Role, Role]] = {
    "output": ("x", "weight"),
    "grad_input": ("grad", "weight"),
    "grad_weight": ("grad", "x"),
}
"""What each product multiplies, left and right."""
SIGNS = -1
"""Beside the sides 0 and 1 of a product: the transform that both have."""


@dataclass(frozen=True)
class Operand:
    """How one operand of a product is written.

    `hadamard` is the size of a random Hadamard transform along the summed dimension (0: none), which both operands of a
    product have or neither. `clamp` is a quantile a (0: none): before the cast each row is clamped between its
    quantiles 1 - a and a, and what lies beyond takes part in the product as it is, in fp32. `dge` is the power k of the
    differentiable gradient estimator (0: none, straight through), which multiplies the weight's gradient. `reused`
    takes what was written for `output` as it is, instead of encoding anew along the dimension that is summed over.
    Text: `nvfp4+stochastic+hadamard16`, `fp4_e2m1:row+clamp0.99`, `fp4_e2m1:row+dge5`, `int8:row+reused`. ValueError
    for an unknown rounding, size, quantile or power, and for options that do not go together.
    """

    format: Format
    rounding: Rounding = "nearest"
    hadamard: int = 0
    clamp: float = 0.0
    dge: float = 0.0
    reused: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r}: is one of {', '.join(ROUNDINGS)}")
        if self.hadamard:
            check_size("hadamard", self.hadamard)
        if self.hadamard and self.is_delayed:
            raise ValueError(f"{self}: a delayed scale is that of numbers before a transform")
        if self.clamp and not 0.5 < self.clamp < 1:
            raise ValueError(f"clamp={self.clamp}: is a quantile between 0.5 and 1, such as 0.99")
        if self.clamp and (self.hadamard or self.is_delayed or self.format.is_dense):
            raise ValueError(f"{self}: only numbers in a format with scales of its own, not transformed, are clamped")
        if self.dge and not 1 <= self.dge <= 100:
            raise ValueError(f"dge={self.dge}: is the estimator's power, 1 to 100, such as 5")
        element = self.format.element
        if self.dge and (self.hadamard or self.clamp or not isinstance(element, Float) or element.bits > 8):
            raise ValueError(f"{self}: the estimator is of floats of 4 to 8 bits, neither transformed nor clamped")
        if self.reused and (self.hadamard or self.rounding != "nearest"):
            raise ValueError(f"{self}: what is reused is neither rounded nor transformed again")

    @property
    def is_plain(self) -> bool:
        """Whether it is a cast number by number to a dtype of torch's own, the same for a matrix and its transpose."""
        return self.format.is_dense and self.rounding == "nearest" and not self.hadamard

    @property
    def turns(self) -> bool:
        """Whether what is written of a matrix's transpose is the transpose of what is written of the matrix: its blocks
        are as long as they are wide, and no number's place decides how it is rounded.
        """
        block = self.format.block
        return self.rounding == "nearest" and not (self.hadamard or self.clamp) and block.rows == block.columns

    @property
    def is_fixed(self) -> bool:
        """Whether what is written of a matrix is a function of its numbers alone: neither random nor of the past."""
        return self.rounding == "nearest" and not self.hadamard and not self.is_delayed

    @property
    def is_delayed(self) -> bool:
        """Whether its scale comes from earlier steps."""
        return isinstance(self.format.scale, ScaleDelayed)

    def __str__(self) -> str:
        parts = [str(self.format)]
        parts += [self.rounding] * (self.rounding != "nearest")
        parts += [f"hadamard{self.hadamard}"] * bool(self.hadamard) + [f"clamp{self.clamp!r}"] * bool(self.clamp)
        parts += [f"dge{repr(self.dge).removesuffix('.0')}"] * bool(self.dge) + ["reused"] * self.reused
        return "+".join(parts)

    @classmethod
    def parse(cls, text: str) -> Operand:
        """The operand that `text` names. ValueError says what is wrong with it."""
        name, *options = (part.strip() for part in text.split("+"))
        operand = cls(parse(name))
        for option in options:
            sized = re.fullmatch(r"(hadamard(?=\d+$)|clamp|dge)(\d+\.?\d*)", option)
            if sized:
                size = int(sized[2]) if sized[1] == "hadamard" else float(sized[2])
                operand = dataclasses.replace(operand, **{sized[1]: size})
            elif option in ROUNDINGS:
                operand = dataclasses.replace(operand, rounding=option)
            elif option == "reused":
                operand = dataclasses.replace(operand, reused=True)
            else:
                raise ValueError(
                    f"operand {text!r}: {option!r} is none of {', '.join(ROUNDINGS)}, hadamard16, hadamard32, "
                    "hadamard64, hadamard128, clamp0.99, dge5, reused"
                )
        return operand


@dataclass(frozen=True)
class Pair:
    """The operands of one product, in the order of the formulas above. Text: `mxfp8_e4m3 @ mxfp8_e4m3`. ValueError
    where one is transformed and the other is not, or otherwise.
    """

    left: Operand
    right: Operand

    def __post_init__(self) -> None:
        if self.left.hadamard != self.right.hadamard:
            raise ValueError(f"{self}: both operands have the same Hadamard transform, or neither has one")

    def __str__(self) -> str:
        return f"{self.left} @ {self.right}"

    def __iter__(self) -> Iterator[Operand]:
        return iter((self.left, self.right))

    @classmethod
    def parse(cls, text: str) -> Pair:
        """The pair that `text` names. ValueError says what is wrong with it."""
        parts = text.split("@")
        if len(parts) != 2:
            raise ValueError(f"product {text!r}: is written as two operands, `mxfp8_e4m3 @ mxfp8_e4m3`")
        return cls(*map(Operand.parse, parts))


@dataclass(frozen=True)
class Recipe:
    """The operands of the three products, and which layers are left in bf16.

    `ends` is the share of the repeated blocks that `prepare_` keeps in bf16: a quarter of them, rounded down, at the
    model's beginning, the others at its end. Text: the name of a known recipe, or
    `output=A @ B; grad_input=A @ B; grad_weight=A @ B; ends=0.16`. ValueError for an operand that is reused and was not
    written so for `output`, for x, W or g with delayed scales of two formats, for an estimator on anything but W of
    `output`, and for `ends` outside 0 to 1.
    """

    output: Pair
    grad_input: Pair
    grad_weight: Pair
    ends: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ends <= 1:
            raise ValueError(f"ends={self.ends}: is a share of the blocks, 0 to 1")
        written = {"grad_input": self.output.right, "grad_weight": self.output.left}
        for name in PRODUCTS:
            pair: Pair = getattr(self, name)
            if pair.left.reused or (pair.right.reused and name == "output"):
                raise ValueError(f"{name}={pair}: only x and W are written for `output`, which itself comes first")
            if pair.right.reused and dataclasses.replace(pair.right, reused=False) != written[name]:
                raise ValueError(f"{name}={pair}: `output` writes this operand as {written[name]}")
            if pair.left.dge or (pair.right.dge and name != "output" and not pair.right.reused):
                raise ValueError(f"{name}={pair}: an estimator is of the W that `output` multiplies")
        for role in ROLES:
            formats = {str(operand.format) for operand in self.operands(role) if operand.is_delayed}
            if len(formats) > 1:
                raise ValueError(f"{role} is written as {' and '.join(sorted(formats))}: it has one delayed scale")

    def __str__(self) -> str:
        named = next((name for name, recipe in RECIPES.items() if recipe == self), None)
        if named is not None:
            return named
        parts = [f"{name}={getattr(self, name)}" for name in PRODUCTS]
        return "; ".join(parts + [f"ends={self.ends!r}"] * bool(self.ends))

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """The recipe that `text` names; a Recipe is returned as it is. ValueError names the known ones; TypeError for
        what is no text.
        """
        if isinstance(text, Recipe):
            return text
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"recipe {text!r}: must be a Recipe or its text, such as 'mxfp8', not {type(text).__name__}"
            )
        if text in RECIPES:
            return RECIPES[text]
        fields = [part.partition("=") for part in text.split(";")]
        given = {name.strip(): value.strip() for name, _, value in fields}
        if not set(PRODUCTS) <= set(given) <= {*PRODUCTS, "ends"} or len(given) < len(fields):
            raise ValueError(
                f"unknown recipe {text!r}: known are {', '.join(RECIPES)}, and `output=A @ B; grad_input=A @ B; "
                "grad_weight=A @ B; ends=0.16`"
            )
        return cls(*(Pair.parse(given[name]) for name in PRODUCTS), ends=float(given.get("ends", 0)))

    def with_(
        self,
        *,
        output: Pair | str | None = None,
        grad_input: Pair | str | None = None,
        grad_weight: Pair | str | None = None,
        ends: float | None = None,
    ) -> Recipe:
        """This recipe with other products (Pairs or their texts) or ends."""
        pairs = {"output": output, "grad_input": grad_input, "grad_weight": grad_weight}
        changes = {name: Pair.parse(p) if isinstance(p, str) else p for name, p in pairs.items() if p is not None}
        return dataclasses.replace(self, **changes, ends=self.ends if ends is None else ends)

    @functools.cached_property
    def is_dense(self) -> bool:
        """Whether every operand is written in a format of torch's own, such as bf16."""
        return all(operand.format.is_dense for name in PRODUCTS for operand in getattr(self, name))

    def pair(self, product: ProductName) -> Pair:
        """The operands of a product."""
        return getattr(self, product)  # type: ignore[no-any-return]

    def operands(self, role: Role) -> tuple[Operand, Operand]:
        """The two ways in which "x", "weight" or "grad" is written."""
        of_role: dict[Role, tuple[Operand, Operand]] = {
            "x": (self.output.left, self.grad_weight.right),
            "weight": (self.output.right, self.grad_input.right),
            "grad": (self.grad_input.left, self.grad_weight.left),
        }
        return of_role[role]

    @functools.cached_property
    def seeds(self) -> tuple[tuple[ProductName, int], ...]:
        """The random numbers of a step, in this order, those of `output` first: of a product the signs of its transform
        (`SIGNS`), and the bits by which its right (1) and left (0) operand is rounded.
        """
        found: list[tuple[ProductName, int]] = []
        for name in PRODUCTS:
            left, right = self.pair(name)
            if left.hadamard:
                found.append((name, SIGNS))
            for side, each in ((1, right), (0, left)):
                if each.rounding == "stochastic":
                    found.append((name, side))
        return tuple(found)

    @functools.cached_property
    def output_seeds(self) -> int:
        """How many of these are `output`'s, all that an evaluation draws."""
        return sum(product == "output" for product, _ in self.seeds)

    @functools.cached_property
    def key(self) -> str:
        """Its text, under which `known` finds it: operations of PyTorch's take no other values. ValueError where
        another recipe has the same, which only formats without a name of their own can bring about.
        """
        text = str(self)
        if _keyed.setdefault(text, self) != self:
            raise ValueError(f"two recipes are both written as {text}: give their formats names of their own")
        return text

    @property
    def turns_x(self) -> bool:
        """Whether x is kept for `grad_weight` by rows [T, K], and not written along the tokens."""
        return self.grad_weight.right.reused or self.grad_weight.right.turns

    def delayed_format(self, role: Role) -> Format | None:
        """The format of "x", "weight" or "grad" whose scale comes from earlier steps; None where there is none."""
        return next((operand.format for operand in self.operands(role) if operand.is_delayed), None)

    @functools.cached_property
    def delayed(self) -> tuple[Role, ...]:
        """The operands whose scale comes from earlier steps."""
        return tuple(role for role in ROLES if any(operand.is_delayed for operand in self.operands(role)))


_keyed: dict[str, Recipe] = {}


def known(key: str) -> Recipe:
    """The recipe of this `Recipe.key`, or text."""
    found = _keyed.get(key)
    if found is None:
        found = _keyed[key] = Recipe.parse(key)
    return found


def _recipe(output: str, grad_input: str, grad_weight: str, ends: float = 0.0) -> Recipe:
    return Recipe(Pair.parse(output), Pair.parse(grad_input), Pair.parse(grad_weight), ends)


def _all(format: str) -> Recipe:
    pair = Pair.parse(f"{format} @ {format}")
    return Recipe(pair, pair, pair)


def _hybrid(block: str) -> Recipe:
    """e4m3 forward, whose numbers need precision; e5m2 for gradients, which need range (arXiv 2209.05433)."""
    forward, backward = f"fp8_e4m3:{block}", f"fp8_e5m2:{block}"
    return _recipe(f"{forward} @ {forward}", f"{backward} @ {forward}", f"{backward} @ {forward}")


RECIPES: dict[str, Recipe] = {
    "bf16": _all("bf16"),
    "fp16": _all("fp16"),
    "fp8-delayed": _hybrid("tensor:delayed"),
    "fp8-current": _hybrid("tensor"),
    "fp8-current:row": _hybrid("row"),
    "fp8-block": _recipe(
        "fp8_e4m3:1x128 @ fp8_e4m3:128x128", "fp8_e4m3:1x128 @ fp8_e4m3:128x128", "fp8_e4m3:1x128 @ fp8_e4m3:1x128"
    ),
    "mxfp8": _all("mxfp8_e4m3"),
    "mxfp6": _recipe("mxfp6_e2m3 @ mxfp6_e2m3", "mxfp6_e3m2 @ mxfp6_e2m3", "mxfp6_e3m2 @ mxfp6_e2m3"),
    "mxfp4": _recipe(
        "mxfp4 @ mxfp4", "mxfp4+stochastic @ mxfp4", "mxfp4+stochastic+hadamard32 @ mxfp4+hadamard32", ends=0.16
    ),
    "nvfp4": _recipe(
        "nvfp4 @ nvfp4:16x16", "nvfp4+stochastic @ nvfp4:16x16", "nvfp4+stochastic+hadamard16 @ nvfp4+hadamard16", 0.16
    ),
    "fp4-dge": _recipe(
        "fp4_e2m1:row+clamp0.99 @ fp4_e2m1:row+dge5",
        "fp8_e5m2:tensor @ fp4_e2m1:row+dge5+reused",
        "fp8_e5m2:tensor @ fp4_e2m1:row+clamp0.99+reused",
    ),
    "int8": _all("int8:row"),
    "bitnet": _recipe("int8:row @ ternary", "bf16 @ ternary+reused", "bf16 @ int8:row+reused"),
}
"""Sources: NVFP4 arXiv 2509.25149; block fp8 arXiv 2412.19437; delayed scaling TransformerEngine; MX arXiv 2310.10537,
with stochastic gradients and a transform for mxfp4 (arXiv 2502.20586); row scales of int8 arXiv 2304.13013; BitNet
b1.58 arXiv 2402.17764. FP4 with an estimator and clamped activations arXiv 2501.17116; its backward products are those
of its authors' MS-AMP: gradients in e5m2 by the forward's fp4 numbers, those of x with the residuals. MS-AMP casts the
latter once more, into e4m3, which its hardware multiplies; here they are multiplied as they are.
"""

BF16, NVFP4, MXFP8, INT8 = RECIPES["bf16"], RECIPES["nvfp4"], RECIPES["mxfp8"], RECIPES["int8"]
