"""Lines of JSON as examples: tokens, and which of them the loss is on.

A line is one of three things. `{"messages": [{"role": …, "content": …}, …]}` is a chat, written by the tokenizer's chat
template; the loss is on what the assistant says, the end of its turn included. `{"prompt": …, "completion": …}` is two
texts one after the other, the loss on the second and the end-of-text token. `{"text": …}` is a document, the loss on
all of it. Other fields are not looked at.

Where a template marks its answers by `{% generation %}`, these are taken. Elsewhere an answer is what the template
writes from the prompt for it (`add_generation_prompt`) to the end of the chat up to it. Templates that write earlier
turns otherwise once more follow (those that drop past thoughts) make an example of every answer with what precedes it.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

IGNORED = -100
"""The label of a token that the loss is not on."""
ROLES = ("system", "developer", "user", "assistant", "tool")
KINDS = '"messages", "prompt" and "completion", or "text"'
PLAIN = (
    "{{ bos_token or '' }}{% for message in messages %}### {{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}\n{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
"""The template that `plain` stands for: every message under a line "### role", answers ended by the end-of-text token.
"""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Example(NamedTuple):
    """Tokens, and each one's label: itself, or IGNORED. The first has nothing before it and is never a label."""

    tokens: list[int]
    labels: list[int]


def template_of(given: str) -> str:
    """The chat template that is called `plain`, or that a file holds. Raises FileNotFoundError where there is none."""
    if given == "plain":
        return PLAIN
    if not Path(given).is_file():
        raise FileNotFoundError(errno.ENOENT, '--template names no file and is not "plain"', given)
    return Path(given).read_text(encoding="utf-8")


def read(files: Sequence[Path], tokenizer: Any, advance: Any = None) -> Iterator[Example]:
    """All examples of these files in their order; `advance` is told the bytes that were read.

    Raises ValueError naming the file, the line and what is wrong with it.
    """
    for file in files:
        with file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                try:
                    if line.strip():
                        yield from examples(_parsed(line), tokenizer)
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: {error}") from error
                if advance is not None:
                    advance(len(line))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start} cannot be read") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"is a JSON {type(record).__name__}, an object with {KINDS} is needed")
    return cast("dict[str, Any]", record)


def examples(record: dict[str, Any], tokenizer: Any) -> list[Example]:
    """What one line holds. Raises ValueError for one that is none of the three kinds, an empty answer, an unknown role,
    a chat without a template, and what the template itself refuses.
    """
    kinds = [kind for kind in ("messages", "prompt", "text") if kind in record]
    if len(kinds) != 1:
        raise ValueError(f"has {', '.join(map(repr, record)) or 'no fields'}; {KINDS} is needed")
    if kinds == ["messages"]:
        return _chat(_messages(record["messages"]), tokenizer)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if kinds == ["text"]:
        tokens = _document(_text(record, "text"), tokenizer, end) + end
        return [_example(tokens, [True] * len(tokens))]
    prompt = _document(_text(record, "prompt", empty=True), tokenizer, end)
    answer = _document(_text(record, "completion"), tokenizer, end, special=False) + end
    return [_example(prompt + answer, [False] * len(prompt) + [True] * len(answer))]


def _example(tokens: Sequence[int], answers: Sequence[Any]) -> Example:
    counted = [bool(answer) and index > 0 for index, answer in enumerate(answers)]
    return Example(list(tokens), [token if counts else IGNORED for token, counts in zip(tokens, counted, strict=True)])


def _text(record: dict[str, Any], name: str, empty: bool = False) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        said = "is missing" if value is None else f"is a {type(value).__name__}"
        raise ValueError(f"{name!r} {said}: it must be a text")
    if not empty and not value.strip():
        raise ValueError(f"{name!r} is empty: there is nothing to learn")
    return value


def _document(text: str, tokenizer: Any, end: list[int], special: bool = True) -> list[int]:
    """The tokens of a text without the end-of-text token that some tokenizers add."""
    tokens = list(tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"])
    return tokens[:-1] if end and tokens[-1:] == end else tokens


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError("'messages' must be a list of messages")
    messages = cast("list[Any]", value)
    for index, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} is a {type(message).__name__}, not an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {index} has the role {role!r}: it is one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {index} ({role}): 'content' must be a text")
        if role == "assistant" and not content.strip():
            raise ValueError(f"message {index}, an answer of the assistant, is empty: there is nothing to learn")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is of the role 'assistant': there is no answer to learn")
    return messages


def _chat(messages: list[dict[str, Any]], tokenizer: Any) -> list[Example]:
    """One example, or one for each answer."""
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(
            "messages are written by a chat template, and this tokenizer has none: give --template FILE (Jinja), or "
            "--template plain"
        )
    if isinstance(template, str) and _GENERATION.search(template):
        made = _applied(messages, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return [_example(made["input_ids"], made["assistant_masks"])]
    text = _applied(messages, tokenizer, tokenize=False)
    spans = [_span(messages, index, tokenizer) for index, each in enumerate(messages) if each["role"] == "assistant"]
    if all(text.startswith(until) for until, _, _ in spans):
        return [_tokens(text, [(begin, end) for _, begin, end in spans], tokenizer)]
    return [_tokens(until, [(begin, end)], tokenizer) for until, begin, end in spans]


def _applied(messages: list[dict[str, Any]], tokenizer: Any, **how: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **how)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def _span(messages: list[dict[str, Any]], index: int, tokenizer: Any) -> tuple[str, int, int]:
    """The chat up to the answer `index` as text, and where in it the answer begins and ends, its end of turn included,
    but no blanks after that.
    """
    before = _applied(messages[:index], tokenizer, tokenize=False, add_generation_prompt=True) if index else ""
    until = _applied(messages[: index + 1], tokenizer, tokenize=False)
    if not until.startswith(before):
        raise ValueError(
            f"the chat template does not write message {index + 1} after its own prompt for it: give --template with "
            "one that marks answers by {% generation %}"
        )
    answer = until[len(before) :].rstrip()
    ends_by_blanks = answer.endswith(messages[index]["content"].rstrip())  # then these are the end of the turn
    return until, len(before), len(until) if ends_by_blanks else len(before) + len(answer)


def _tokens(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Example:
    """The tokens of a chat; those that hold a part of one of the spans are answers."""
    if not tokenizer.is_fast:
        raise ValueError("this tokenizer does not say where its tokens lie: give --template with {% generation %}")
    made = tokenizer(text, verbose=False, add_special_tokens=False, return_offsets_mapping=True)
    answers = [any(first < end and begin < last for begin, end in spans) for first, last in made["offset_mapping"]]
    return _example(made["input_ids"], answers)
