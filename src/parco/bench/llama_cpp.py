"""A GGUF file in llama.cpp, through the C functions that llama-cpp-python (0.3) exposes: nothing of Python lies within
what is timed.

llama.cpp decides what it does by itself: weights are laid out anew for this CPU where it can (`use_extra_bufts`),
attention is its flash attention, keys and values are fp16.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor

BATCH = 512
"""Tokens of a prompt that are computed at once; llama.cpp's own default."""


@cache
def _library() -> Any:
    """llama_cpp, told once to keep its log to itself. The callback lives as long as the process: it stays set."""
    found: Any = import_module("llama_cpp")
    found.parco_quiet = found.llama_log_callback(lambda level, text, data: None)
    found.llama_log_set(found.parco_quiet, ctypes.c_void_p(0))
    found.llama_backend_init()
    return found


class LlamaCpp:
    """A model in llama.cpp, on `threads` threads, for `context` tokens. A context manager: closing frees the model.

    Raises ImportError without the package llama-cpp-python, ValueError for a file that llama.cpp cannot load.
    """

    def __init__(self, file: str | os.PathLike[str], threads: int, context: int = 1024) -> None:
        llama_cpp = _library()
        self._library = llama_cpp
        self._model: Any = None
        self._context: Any = None
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(os.fspath(file).encode(), settings)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {os.fspath(file)!r}")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = context, BATCH, BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not self._context:
            self.close()
            raise ValueError(f"llama.cpp makes no context of {context} tokens for {os.fspath(file)!r}")
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))
        self.nbytes = int(llama_cpp.llama_model_size(self._model))

    @property
    def features(self) -> str:
        """What this build of llama.cpp uses, as it says itself."""
        return str(self._library.llama_print_system_info().decode())

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Those that follow each of `tokens`, fp32 [len(tokens), vocabulary]."""
        self._forget()
        return torch.stack([self._after(token) for token in tokens])

    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds of a prompt, with the logits of its last position."""
        self._forget()
        return sum(self._seconds(tokens[start : start + BATCH]) for start in range(0, len(tokens), BATCH))

    def decode(self, prompt: Sequence[int], steps: int) -> list[float]:
        """Seconds of each of `steps` greedy steps after `prompt`; choosing the token is not counted."""
        self.prefill(prompt)
        found: list[float] = []
        for _ in range(steps):
            token = int(self._last().argmax())
            found.append(self._seconds([token]))
        return found

    def close(self) -> None:
        """Frees the model; what is done with it afterwards is an error."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _after(self, token: int) -> Tensor:
        self._seconds([token])
        return self._last()

    def _seconds(self, tokens: Sequence[int]) -> float:
        held = (self._library.llama_token * len(tokens))(*tokens)
        batch = self._library.llama_batch_get_one(held, len(tokens))
        began = time.perf_counter()
        failed = self._library.llama_decode(self._context, batch)
        self._library.llama_synchronize(self._context)
        seconds = time.perf_counter() - began
        assert failed == 0, f"llama_decode answers {failed}"
        return seconds

    def _last(self) -> Tensor:
        found = self._library.llama_get_logits_ith(self._context, -1)
        return torch.tensor(found[: self.vocabulary])

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
