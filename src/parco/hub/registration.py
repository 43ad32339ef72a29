"""Makes Transformers' `from_pretrained` understand folders that parco saved, from `import parco` on.

Transformers keeps quantizers in two dictionaries of `transformers.quantizers.auto`, and importing that module takes
seconds (it pulls the modelling code, and torchao where that is installed). So if it is not loaded yet, a finder at
the front of `sys.meta_path` waits for its import, lets the usual finders and loader do it, registers, and is removed
once that has succeeded. `import parco` alone thus does not import Transformers."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AWAITED = "transformers.quantizers.auto"


def register() -> None:
    """Registers the quantization method "parco" with Transformers, now if it is loaded and else when it will be.
    Idempotent."""
    auto = sys.modules.get(AWAITED)
    if auto is not None and not _initializing(auto):
        _register_with(auto)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _register_with(auto: ModuleType) -> None:
    if "parco" in auto.AUTO_QUANTIZER_MAPPING:
        return
    from parco.hub.quantizer import ParcoConfig, ParcoQuantizer

    auto.register_quantization_config("parco")(ParcoConfig)
    auto.register_quantizer("parco")(ParcoQuantizer)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing of its own: it wraps the loader that the other finders give for the awaited module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AWAITED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads as the wrapped loader does, then registers; anything else asked of it is answered by the wrapped one."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        _register_with(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
