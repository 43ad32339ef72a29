"""`parco bench --whole`: a model in several formats beside Transformers' own and llama.cpp on the same stored numbers.

For every format the model is converted and fused as `parco generate` runs it, and written as a GGUF file that holds the
very same codes and scales (scales rounded to fp16 where parco's are wider), so that llama.cpp computes the same
function from as many bits. All of them take turns in one process, on the same number of threads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from parco import hub
from parco.bench import LlamaCpp, ModelsReport, Transformed, speeds
from parco.bench.speeds import Absent, Entrant, check
from parco.fitting.convert import convert_
from parco.fitting.stages import tell
from parco.formats import parse
from parco.hub.gguf import save_gguf
from parco.hub.vocabulary import UnknownTokenizerError
from parco.nn import StoredWeight, embedding_name, fuse_, head_name, linears, tied

if TYPE_CHECKING:
    from parco.fitting.stages import Progress

FORMATS = ("bf16", "int8:32", "int4:32", "ternary")
ENDS = "int4:32"
"""What the embedding and the head are stored in where the rest has fewer than 4 bits."""


def run(
    model: str | Path | None = None,
    *,
    formats: Sequence[str] | None = None,
    llama_cpp: bool | None = None,
    prompt: int = 512,
    steps: int = 64,
    rounds: int = 3,
    progress: Progress | None = None,
) -> ModelsReport:
    """Tokens per second of a model (a folder or hub name, the embedded one without) in each of `formats`.

    The first entrant is the model as Transformers runs it; of a model that parco has saved, it is the only one, and
    `formats` must be None. `llama_cpp`: whether llama.cpp takes part, by default where llama-cpp-python and gguf are
    installed. All models are held in memory at once, llama.cpp's files in the folder for temporary ones. Raises
    ValueError for unknown formats, what `hub.load` and `speeds` refuse, and where llama.cpp is asked for and not
    installed.
    """
    check(prompt, steps, rounds)
    for text in formats or ():
        parse(text)
    source = hub.embedded_path() if model is None else model
    loaded = hub.load(source)
    if progress:
        tell(progress, loaded.notes)
    fitted = any(isinstance(module, StoredWeight) for module in loaded.model.modules())
    if fitted and formats is not None:
        raise ValueError(f"formats={','.join(formats)}: {str(source)!r} is stored by parco already, and stays so")
    names = [] if fitted else [str(parse(text)) for text in formats or FORMATS]
    here = all(map(importlib.util.find_spec, ("llama_cpp", "gguf")))
    if llama_cpp and not here:
        raise ValueError("llama.cpp takes part through llama-cpp-python and gguf, which are not both installed")
    beside = here if llama_cpp is None else llama_cpp
    files = _Files(loaded) if beside else None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="parco-whole-")))
        entrants: list[Entrant] = []
        missing: list[Absent] = []
        if progress:
            progress.stage("convert", max(len(names), 1))
        if fitted:
            fuse_(loaded.model)
            rival = files.open(stack, folder, loaded.model, "as saved", missing) if files else None
            entrants += [_ours("parco as saved", loaded.model, rival), *filter(None, [rival])]
        else:
            entrants.append(_ours("Transformers", loaded.model, None))
        for name in names:
            made = hub.load(source).model
            _convert(made, name)
            fuse_(made)
            rival = files.open(stack, folder, made, name, missing) if files else None
            entrants += [_ours(f"parco {name}", made, rival), *filter(None, [rival])]
            if progress:
                progress.advance()
        if progress:
            progress.stage("measure", len(entrants) * (rounds + 1))
        return speeds(
            entrants,
            model=Path(source).name,
            vocabulary=loaded.model.config.vocab_size,
            prompt=prompt,
            steps=steps,
            rounds=rounds,
            libraries=("transformers", *(("llama-cpp-python", "gguf") if beside else ())),
            notes={"llama.cpp": files.features} if files else {},
            missing=missing,
            advance=progress.advance if progress else _nothing,
        )


def _nothing() -> None:
    pass


def _convert(model: torch.nn.Module, name: str) -> None:
    """All matrices in the format `name`; embedding and head in ENDS where that has more bits."""
    ends: set[str] = set()
    for end in (embedding_name(model), head_name(model)):
        if end is not None:
            ends.update(tied(model, end))
    outer = name if parse(name).bits >= parse(ENDS).bits else ENDS
    convert_(model, name, lambda _, site: site not in ends)
    if ends:
        convert_(model, outer, lambda _, site: site in ends)


def _ours(name: str, model: torch.nn.Module, rival: Entrant | None) -> Entrant:
    """The embedding is not read but for one row, unless it is the head too."""
    head, embedding = head_name(model), embedding_name(model)
    sizes = {site: found.shape[0] * found.shape[1] for site, found in linears(model).items()}
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    alone = embedding is not None and head not in tied(model, embedding)
    unread = 0
    if alone and embedding is not None:
        unread = sum(p.numel() * p.element_size() for p in model.get_submodule(embedding).parameters())
    step = sum(sizes.values())
    inner = step - (sizes.get(head, 0) if head else 0)
    return Entrant(name, Transformed(model), whole - unread, inner, step, rival.name if rival else "")


class _Files:
    """GGUF files of models that differ from `loaded` in how they are stored, opened in llama.cpp."""

    def __init__(self, loaded: hub.Loaded) -> None:
        self._tokenizer: Any = loaded.tokenizer
        self.features = ""

    def open(self, stack: ExitStack, folder: Path, model: Any, name: str, missing: list[Absent]) -> Entrant | None:
        """None, and a reason in `missing`, where llama.cpp has no type that holds what is stored."""
        try:
            file = self._save(model, folder / f"{name.replace(':', '-')}.gguf")
        except ValueError as error:
            missing.append({"contender": f"llama.cpp {name}", "reason": str(error)})
            return None
        kind, read = _read_bytes(file)
        runner = stack.enter_context(LlamaCpp(file, torch.get_num_threads(), context=2048))
        self.features = runner.features
        ours = _ours(name, model, None)
        return Entrant(f"llama.cpp {kind} of {name}", runner, read, ours.prompt_products, ours.step_products)

    def _save(self, model: Any, file: Path) -> Path:
        try:
            return save_gguf(model, self._tokenizer, file, round_scales=True)
        except UnknownTokenizerError:
            # Speed needs no text: a tokenizer that llama.cpp lacks stays outside.
            return save_gguf(model, None, file, round_scales=True)


def _read_bytes(file: Path) -> tuple[str, int]:
    """The type of most matrices, and the bytes that a step reads: all but the embedding, unless it is the head too."""
    import gguf

    tensors: list[Any] = gguf.GGUFReader(file).tensors
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    kinds = [tensor.tensor_type.name for tensor in matrices]
    shared = all(tensor.name != "output.weight" for tensor in tensors)
    read = sum(int(tensor.n_bytes) for tensor in tensors if shared or tensor.name != "token_embd.weight")
    return max(set(kinds), key=kinds.count), read
