"""The page as a document: parsed, not searched for substrings, wherever structure matters."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report import example

from parco import report
from parco.report import page

VOID = {"meta", "link", "br", "input", "img"}


class Outline(HTMLParser):
    """Every element with its attributes and text; raises when a tag is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def text() -> str:
    return page.render(example.result())


@pytest.fixture(scope="module")
def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_one_file_that_names_no_other(outline: Outline):
    links = [
        value for _, attributes in outline.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(link and (link.startswith(("#", "data:"))) for link in links)
    assert "default-src 'none'" in str([attributes for tag, attributes in outline.elements if tag == "meta"])


def test_text_of_models_and_users_never_becomes_markup(text: str, outline: Outline):
    assert example.MARKUP not in text
    assert any(example.MARKUP in code for code in outline.texts["code"])
    assert "b" not in {tag for tag, _ in outline.elements}
    assert "tiny & <b>llama" in outline.texts["h1"][0]


def test_both_completions_follow_the_prompt(outline: Outline):
    completions = [code for code in outline.texts["code"] if code.startswith("def read(path):\n")]
    assert [code.splitlines()[-1].strip() for code in completions] == [
        "return open(path).read()",
        "return file.read() & 1",
    ]


def test_each_table_says_over_how_many_windows_it_is(text: str):
    assert "held-out text over 64 windows of 512 tokens" in text
    assert "<caption>Measured end to end on the first 48 of 64 held-out windows, smallest loss first</caption>" in text


def test_every_table_has_headed_columns_and_rows(outline: Outline):
    headers = [attributes for tag, attributes in outline.elements if tag == "th"]
    assert headers
    assert all(attributes.get("scope") in ("col", "row") for attributes in headers)


def test_every_layer_is_there_with_its_choice_and_what_was_passed_over(text: str, outline: Outline):
    result = example.result()
    assert len(outline.texts["details"]) == len(result["groups"])
    for row in result["groups"]:
        assert f'<th scope="row">{row["group"]}<small>' in text
    assert "0.0029 nats more for few bytes &lt;saved&gt;" in text


def test_the_comparison_shows_both_models(outline: Outline):
    cells = outline.texts["td"]
    for shown in ("27.0 MB", "9.40 MB", "1.5012", "1.5187", "+0.0175", "96.2%", "190", "251", "1.32×"):
        assert shown in cells


def test_where_it_comes_from_is_said(outline: Outline):
    told = " ".join(outline.texts["dd"] + outline.texts["li"])
    for part in (
        "Platinum 8581C",
        "avx512",
        "torch 2.13.0",
        "5f0c2a",
        "MODEL came without --data",
        "apply 1 min 40 s; of an earlier run: calibrate",
        "4 of them written by the model",
    ):
        assert part in told
    assert example.result()["command"] in outline.texts["code"]


def test_the_same_result_gives_the_same_bytes(text: str, tmp_path: Path):
    written = report.write(example.result(), tmp_path / "report.html")
    assert written.read_text(encoding="utf-8") == text


def test_a_result_without_alternatives_healing_or_memory_still_has_a_page():
    result = example.result()
    result["alternatives"], result["heal"], result["warnings"], result["folder"] = [], None, [], None
    result["original"]["memory"] = result["fitted"]["memory"] = None
    for point in result["frontier"]:
        point["measured_loss"] = point["healed_loss"] = point["measured_decode_seconds"] = None
    shown = page.render(result)
    assert "Peak memory" not in shown
    assert "Measured end to end" not in shown
    assert 'class="warnings"' not in shown


def test_an_unmet_target_is_not_called_reached():
    result = example.result()
    result["target"]["met"] = False
    shown = page.render(result)
    assert "not met: 0.3481" in shown
    assert "reached: 0.3481" not in shown


def test_white_space_that_a_model_wrote_is_counted_instead_of_shown():
    result = example.result()
    result["sample"] = {"prompt": "\n\n", "original": "    return 1" + 90 * "\n", "fitted": 96 * "\n"}
    shown = page.render(result)
    assert "<mark>(2 characters of white space)</mark>    return 1</code>" in shown
    assert "<mark>(2 characters of white space)</mark>(96 characters of white space)</code>" in shown


def test_what_was_not_timed_has_no_time():
    result = example.result()
    row = result["groups"][0]
    row["decode_seconds"] = row["original_decode_seconds"] = None
    row["prefill_seconds"] = row["original_prefill_seconds"] = None
    shown = page.render(result).partition(f'<th scope="row">{row["group"]}<')[2].partition("</tr>")[0]
    assert shown.endswith("<td>not measured</td><td>not measured</td>")
