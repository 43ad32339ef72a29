"""Products: how one product of matrices is computed, and the certificate of what that costs in accuracy.

>>> import torch
>>> from parco.products import Split, certificate, matmul
>>> a, b = torch.randn(32, 256), torch.randn(256, 48)
>>> matmul(a, b, Split(3)).shape
torch.Size([32, 48])
>>> certificate(a, b, "split(3)").used <= 1
True
"""

from parco.products.certificate import Certificate, certificate
from parco.products.how import Activations, Native, Product, Split, parse
from parco.products.matmul import matmul

__all__ = ["Activations", "Certificate", "Native", "Product", "Split", "certificate", "matmul", "parse"]
