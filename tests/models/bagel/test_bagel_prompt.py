"""Tokens and text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bagel_loop import TINY

from mstar.errors import InvalidRequest, WeightsError
from mstar.models import bagel
from mstar.models.bagel.prompt import THINK_THEN_ANSWER, THINK_THEN_DRAW, Tokenizer

FULL = Path(bagel.__file__).parent / "full" / "bagel"
FACTS = json.loads((Path(__file__).parents[2] / "data" / "bagel" / "goldens.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY)


@pytest.mark.parametrize("entry", FACTS["tokenizer"], ids=lambda entry: repr(entry["text"]))
def test_ids_are_those_of_the_reference(entry, tokenizer):
    assert tokenizer.encode(entry["text"]) == entry["ids"]


@pytest.mark.parametrize("entry", FACTS["detokenize"], ids=lambda entry: repr(entry["text"]))
def test_text_is_that_of_the_reference(entry, tokenizer):
    assert tokenizer.decode(entry["ids"]) == entry["text"]


def test_marks_and_system_prompts_are_those_of_the_reference(tokenizer):
    marks = FACTS["special_tokens"]
    assert tokenizer.start == marks["bos_token_id"]
    assert tokenizer.end == marks["eos_token_id"]
    assert tokenizer.image_start == marks["start_of_image"]
    assert tokenizer.image_end == marks["end_of_image"]
    assert FACTS["system_prompts"] == {"vlm": THINK_THEN_ANSWER, "gen": THINK_THEN_DRAW}


def test_a_text_span_is_text_between_two_marks(tokenizer):
    assert tokenizer.text_span("") == [401, 402]
    case = FACTS["cases"]["chat"]
    assert tokenizer.text_span(case["text"]) == case["prompt_token_ids"]


def test_generated_text_ends_at_the_first_mark_around_text(tokenizer):
    words = tokenizer.encode("A photo")
    assert tokenizer.answer(words) == "A photo"
    assert tokenizer.answer([]) == ""
    for mark in (tokenizer.start, tokenizer.end):
        assert tokenizer.answer([*words, mark, *words, tokenizer.end]) == "A photo"
    assert tokenizer.answer([tokenizer.image_start]) == "<|vision_start|>"


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="character 2 is half of a surrogate pair"):
        tokenizer.encode("ab\ud83d")


def test_the_tokenizer_for_dummy_weights_has_the_ids_of_the_published_one():
    full = Tokenizer(FULL)
    marks = (full.start, full.end, full.image_start, full.image_end)
    assert marks == (151644, 151645, 151652, 151653)
    assert full.size == 151665
    text = "What is <think> 17 </think> — 日本語?"
    assert full.decode(full.encode(text)) == text
    assert full.encode("<|endoftext|><|file_sep|><|fim_middle|>") == [151643, 151664, 151660]


def test_folders_without_this_tokenizer_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"no tokenizer\.json in"):
        Tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(WeightsError, match="is not a tokenizer"):
        Tokenizer(tmp_path)
    other = json.loads((TINY / "tokenizer.json").read_text())
    other["added_tokens"] = other["added_tokens"][:9]
    file.write_text(json.dumps(other))
    with pytest.raises(WeightsError, match=r"BAGEL's: it has no <\|vision_start\|>, <\|vision_"):
        Tokenizer(tmp_path)
