"""The noun Method: how a dense matrix, and what was seen of its inputs, become a stored Weight.

    >>> import torch
    >>> from parco.fitting.methods import Factor, Quantize, parse
    >>> method = Factor(0.5) >> Quantize("int4:32")
    >>> str(method), parse(str(method)) == method
    ('factor(0.5)>>int4:32', True)
    >>> str(method.spec((512, 256)))
    'lowrank(quantized(int4:32, 512x80), quantized(int4:32, 80x256))'
    >>> str(parse("scale>>int4:64").spec((512, 256)))
    'scaled(quantized(int4:64, 512x256), dense(bf16, 1x256))'
    >>> spec, tensors = method(torch.randn(512, 256))
    >>> spec == method.spec((512, 256))
    True

A method is a value: frozen, comparable, printable, parsed back by `parse`. Its law: `method(weight, statistics)`
returns `method.spec(weight.shape)` and tensors of exactly the shapes and dtypes which that names, so bytes are known
before any work.

Methods compose as Weights do, with Python's own precedence: `a >> b` stores what a makes by b, and `a + b` adds b's
fit of what a leaves over. `int4:32+factor(rank=16)>>int8:row` is therefore a correction whose factors are int8, and
`scale>>int4:32+factor(rank=16)` scales the columns before both (SVDQuant's shape).
"""

from parco.fitting.methods.correct import Corrected
from parco.fitting.methods.factor import Factor, Metric, QuantizedFactors
from parco.fitting.methods.joint import Joint
from parco.fitting.methods.method import Made, Method, Shape, output_error
from parco.fitting.methods.prune import Prune, QuantizedPrune, Score
from parco.fitting.methods.quantize import Keep, Quantize, Solver
from parco.fitting.methods.text import KNOWN, parse
from parco.fitting.methods.transform import Rotate, Rule, Scale, Transform, Transformed

__all__ = [
    "KNOWN",
    "Corrected",
    "Factor",
    "Joint",
    "Keep",
    "Made",
    "Method",
    "Metric",
    "Prune",
    "Quantize",
    "QuantizedFactors",
    "QuantizedPrune",
    "Rotate",
    "Rule",
    "Scale",
    "Score",
    "Shape",
    "Solver",
    "Transform",
    "Transformed",
    "output_error",
    "parse",
]
