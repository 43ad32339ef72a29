"""Lines of JSON as examples: the loss is on answers and their ends alone; what is broken is named by its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.hub import tiny

from parco.trainer import examples
from parco.trainer.examples import IGNORED, PLAIN, Example

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: an answer's thoughts are dropped once more follows."""
BARE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = [
    {"role": "system", "content": "import torch"},
    {"role": "user", "content": "def fit(model, size):"},
    {"role": "assistant", "content": "return model\n"},
    {"role": "user", "content": "class Weight:"},
    {"role": "assistant", "content": "for a, b in pairs.items():"},
]


def tokenizer(template: str | None = None) -> Any:
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def learned(example: Example, words: Any) -> str:
    """What the loss is on, as text."""
    assert all(label in (IGNORED, token) for token, label in zip(*example, strict=True))
    return words.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "return model\n<|im_end|>for a, b in pairs.items():<|im_end|>"),
        (PLAIN, "return model\n</s>for a, b in pairs.items():</s>"),
        (BARE, " return model\n\n\nfor a, b in pairs.items():\n\n"),
    ],
)
def test_the_loss_is_on_answers_and_their_ends(template: str, text: str) -> None:
    words = tokenizer(template)
    (found,) = examples.examples({"messages": CHAT, "id": 7}, words)
    assert learned(found, words) == text
    assert found.tokens == words.apply_chat_template(CHAT, return_dict=True)["input_ids"]


def test_a_template_that_marks_its_answers_is_asked_for_them() -> None:
    marked = CHATML.replace(
        "{{ message.content }}<|im_end|>\n",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}",
    )
    assert examples.examples({"messages": CHAT}, tokenizer(marked)) == examples.examples(
        {"messages": CHAT}, tokenizer(CHATML)
    )


def test_answers_that_are_written_otherwise_later_are_examples_of_their_own() -> None:
    words = tokenizer(FORGETFUL)
    found = examples.examples({"messages": CHAT}, words)
    assert [learned(each, words) for each in found] == [
        "<think></think>return model\n<|im_end|>",
        "<think></think>for a, b in pairs.items():<|im_end|>",
    ]
    assert [words.decode(each.tokens) for each in found] == [
        words.apply_chat_template(CHAT[: end + 1], tokenize=False) for end in (2, 4)
    ]


def test_a_prompt_is_read_as_it_will_be_and_its_completion_ends() -> None:
    words = tokenizer()
    (found,) = examples.examples({"prompt": "def fit(mo", "completion": "del, size):"}, words)
    prompt = words("def fit(mo")["input_ids"]
    assert found.tokens[: len(prompt)] == prompt, "no token of both"
    assert learned(found, words) == "del, size):</s>"
    (whole,) = examples.examples({"prompt": "", "completion": "import torch"}, words)
    (text,) = examples.examples({"text": "import torch"}, words)
    assert whole == text and text.labels[0] == IGNORED and text.labels[1:] == text.tokens[1:]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "is no JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "\xff"}', "is not UTF-8: byte 10"),
        (b"[1]", "is a JSON list, an object"),
        (b'{"texts": "a"}', "has 'texts'"),
        (b'{"text": "a", "prompt": "b"}', "has 'text', 'prompt'"),
        (b'{"text": " "}', "'text' is empty"),
        (b'{"text": 3}', "'text' is a int"),
        (b'{"prompt": "a"}', "'completion' is missing"),
        (b'{"prompt": "a", "completion": ""}', "'completion' is empty"),
        (b'{"messages": []}', "must be a list of messages"),
        (b'{"messages": [3]}', "message 1 is a int"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "message 1 has the role 'robot': it is one of system"),
        (b'{"messages": [{"role": "user", "content": ["a"]}]}', "message 1 (user): 'content' must be a text"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no message is of the role 'assistant'"),
        (b'{"messages": [{"role": "assistant", "content": "\\n"}]}', "message 1, an answer of the assistant, is empty"),
    ],
)
def test_a_broken_line_is_named(line: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b'{"text": "import torch"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        list(examples.read([file], tokenizer(CHATML)))
    assert str(caught.value).startswith(f"{file}, line 3: ")
    assert words in str(caught.value)


def test_templates_are_named_found_and_may_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this tokenizer has none: give --template"):
        examples.examples({"messages": CHAT}, tokenizer())
    assert examples.template_of("plain") == PLAIN
    (tmp_path / "mine.jinja").write_text(CHATML)
    assert examples.template_of(str(tmp_path / "mine.jinja")) == CHATML
    with pytest.raises(FileNotFoundError, match="--template names no file"):
        examples.template_of("absent")
    picky = tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses it: roles must alternate"):
        examples.examples({"messages": CHAT}, picky)
    with pytest.raises(ValueError, match="does not write message 3 after its own prompt"):
        examples.examples({"messages": CHAT}, tokenizer(CHATML.replace("<|im_start|>assistant", "now:")))
    lines = "\n".join(json.dumps({"messages": CHAT}) for _ in range(3))
    (tmp_path / "three.jsonl").write_text(lines)
    told: list[int] = []
    assert len(list(examples.read([tmp_path / "three.jsonl"], tokenizer(CHATML), told.append))) == 3
    assert sum(told) == len(lines)
