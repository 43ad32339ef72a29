"""In and out: models and tokenizers from folders and from the Hugging Face hub, dense, fitted, or quantized by others,
and fitted ones as folders that Transformers or vLLM loads, or as files for llama.cpp."""

from parco.hub.compressed import save_compressed
from parco.hub.dense import save_dense
from parco.hub.export import Exported, export
from parco.hub.gguf import save_gguf
from parco.hub.gguf_read import read_gguf
from parco.hub.load import Loaded, load, locate
from parco.hub.registration import register
from parco.hub.save import PAGES, attach, refuse_foreign, save
from parco.hub.shipped import Texts, embedded_path, embedded_texts

__all__ = [
    "PAGES",
    "Exported",
    "Loaded",
    "Texts",
    "attach",
    "embedded_path",
    "embedded_texts",
    "export",
    "load",
    "locate",
    "read_gguf",
    "refuse_foreign",
    "register",
    "save",
    "save_compressed",
    "save_dense",
    "save_gguf",
]
