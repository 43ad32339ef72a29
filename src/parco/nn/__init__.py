"""Modules that hold a stored Weight, and what is known of the architectures into which they are put."""

from parco.nn.blocks import (
    Group,
    bias,
    blocks,
    embedding_name,
    groups,
    head_name,
    linears,
    matrix,
    replace_,
    site,
    tied,
)
from parco.nn.experts import Experts
from parco.nn.fuse import Fusion, fuse_
from parco.nn.linear import Embedding, Linear
from parco.nn.loss import LinearCrossEntropy
from parco.nn.product import set_product_
from parco.nn.shared import share_
from parco.nn.sites import Site
from parco.nn.stored import StoredWeight, pack_, packed

__all__ = [
    "Embedding",
    "Experts",
    "Fusion",
    "Group",
    "Linear",
    "LinearCrossEntropy",
    "Site",
    "StoredWeight",
    "bias",
    "blocks",
    "embedding_name",
    "fuse_",
    "groups",
    "head_name",
    "linears",
    "matrix",
    "pack_",
    "packed",
    "replace_",
    "set_product_",
    "share_",
    "site",
    "tied",
]
