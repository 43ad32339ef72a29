"""A tokenizer as a GGUF file holds it: byte-level BPE, and SentencePiece's BPE with bytes as a last resort."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: "llama-bpe",
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: "qwen2",
}
"""How text is cut before the merges, and llama.cpp's name for it."""

SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""Tokens with a part of their own, and what the file's metadata calls them."""


class UnknownTokenizerError(ValueError):
    """llama.cpp has no tokenizer like this one."""


def write(writer: Any, tokenizer: PreTrainedTokenizerBase | None, size: int) -> None:
    """Puts `tokenizer` into the file, or says that there is none. `size` is the number of rows of the embedding: tokens
    that the tokenizer lacks get names. Raises UnknownTokenizerError for one that llama.cpp does not know.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("it is not a fast one")
    found = json.loads(backend.to_str())
    vocabulary = found["model"].get("vocab", {})
    if found["model"].get("type") != "BPE":
        raise _unknown(f"its model is {found['model'].get('type')}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in found["model"]["merges"]]
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [_type("UNUSED")] * size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, _type("NORMAL")
    for added in found["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _type("CONTROL" if added["special"] else "USER_DEFINED")
    if found["model"].get("byte_fallback"):
        _write_pieces(writer, tokens, types, merges, found)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cut(found))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(_begins(tokenizer))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _write_pieces(writer: Any, tokens: list[str], types: list[int], merges: list[str], found: Any) -> None:
    """SentencePiece joins the two pieces whose union scores highest, BPE those whose merge ranks first: the score is
    the rank.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    for index, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = _type("BYTE")
        elif token == found["model"].get("unk_token"):
            types[index] = _type("UNKNOWN")
    texts = json.dumps([found["normalizer"], found["pre_tokenizer"]], ensure_ascii=False)
    if "▁" not in texts:
        raise _unknown("it has bytes as a last resort, but writes no ▁ for a space")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    writer.add_add_space_prefix('"Prepend"' in texts or '"prepend_scheme": "first"' in texts)


def _cut(found: Any) -> str:
    """llama.cpp's name of the way in which text is cut before the merges."""
    cutter = found["pre_tokenizer"] or {}
    steps: list[Any] = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or found["normalizer"] not in (None, _NFC):
        raise _unknown(f"it prepares text by {json.dumps([found['normalizer'], cutter])}")
    if not before and last.get("use_regex"):
        return "gpt-2"
    patterns = [step.get("pattern", {}).get("Regex") for step in before]
    if len(patterns) == 1 and patterns[0] in PATTERNS and not last.get("use_regex"):
        return PATTERNS[patterns[0]]
    raise _unknown(f"it cuts text by {patterns}")


_NFC = {"type": "NFC"}


def _type(name: str) -> int:
    import gguf

    return int(gguf.TokenType[name])


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every text begins with the token that says so."""
    numbers = list(tokenizer("a")["input_ids"])
    return bool(numbers) and numbers[0] == tokenizer.bos_token_id


def _unknown(reason: str) -> UnknownTokenizerError:
    return UnknownTokenizerError(
        f"llama.cpp does not know this tokenizer: {reason}; tokenizer=None writes the model without it"
    )


def read(fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer in a file's metadata. Raises UnknownTokenizerError for one that parco does not write either, one
    that is damaged, and none.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields.get("tokenizer.ggml.tokens") or []
    types: list[int] = fields.get("tokenizer.ggml.token_type") or [_type("NORMAL")] * len(tokens)
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama") or not tokens or len(types) != len(tokens):
        raise UnknownTokenizerError(
            f"its tokenizer is {model!r} of {len(tokens)} tokens; parco reads 'gpt2' and 'llama', and no file without"
            " one"
        )
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != _type("UNUSED")}
    numbers = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
            raise UnknownTokenizerError(
                f"its tokenizer.ggml.{SPECIAL[name]}_token_id is {number!r}; a token's number below {len(tokens)} is"
                " needed"
            )
    try:
        made: Tokenizer = (_byte_level if model == "gpt2" else _pieces)(fields, vocabulary)
    except UnknownTokenizerError:
        raise
    except Exception as error:  # tokenizers raises what it finds as plain Exceptions
        raise UnknownTokenizerError(f"its tokenizer is damaged: {' '.join(str(error).split())}") from error
    for kind, special in (("CONTROL", True), ("USER_DEFINED", False)):
        added = [token for token, index in vocabulary.items() if types[index] == _type(kind)]
        made.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    named = {f"{name}_token": tokens[number] for name, number in numbers.items() if number is not None}
    first = numbers["bos"]
    if fields.get("tokenizer.ggml.add_bos_token", model == "llama") and first is not None:
        made.post_processor = _beginning(tokens[first], first)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **named)
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _beginning(token: str, number: int) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


def _byte_level(fields: Mapping[str, Any], vocabulary: dict[str, int]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = fields.get("tokenizer.ggml.pre", "default")
    patterns = {name: pattern for pattern, name in PATTERNS.items()}
    if cut not in ("gpt-2", *patterns):
        raise UnknownTokenizerError(f"its tokenizer cuts text as {cut!r}; parco reads gpt-2, {', '.join(patterns)}")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or []]
    # Llama 3's takes a piece that is a token as it is, whatever the merges say.
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe"))
    made.decoder = decoders.ByteLevel()
    if cut == "gpt-2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return made
    if cut == "qwen2":
        made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(patterns[cut]), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    return made


def _pieces(fields: Mapping[str, Any], vocabulary: dict[str, int]) -> Any:
    """The merges are those of two pieces whose union is one; the union that scores highest comes first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores: list[float] = fields.get("tokenizer.ggml.scores") or []
    if len(scores) != len(fields["tokenizer.ggml.tokens"]):
        raise UnknownTokenizerError(f"its tokenizer has {len(scores)} scores; one for each token is needed")
    merges = [
        (-scores[index], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    made = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in sorted(merges)],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=fields["tokenizer.ggml.tokens"][unknown],
        )
    )
    spaces = [normalizers.Replace(" ", "▁")]
    begins = fields.get("tokenizer.ggml.add_space_prefix", True)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if begins else spaces)
    strip = [decoders.Strip(" ", 1, 0)] if begins else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made
