from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mstar.models.orpheus
from mstar.errors import WeightsError
from mstar.models.orpheus.prompt import load_tokenizer, prompt_ids, split_sentences

TINY = Path(mstar.models.orpheus.__file__).parent / "tiny" / "lm"
DATA = Path(__file__).parents[2] / "data" / "orpheus"
CASES = json.loads((DATA / "goldens.json").read_text())["cases"]


@pytest.fixture(scope="module")
def encode():
    return load_tokenizer(TINY)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["voice"] or "no voice")
def test_prompts_are_those_of_the_reference(case, encode):
    expected = load_file(DATA / "goldens.safetensors")[f"c{case['index']}.prompt_ids"].tolist()
    assert prompt_ids(encode, case["text"], case["voice"] or "") == expected


def test_a_missing_or_broken_tokenizer_is_an_error_that_says_so(tmp_path):
    with pytest.raises(WeightsError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_short_text_is_one_utterance_as_it_is():
    assert split_sentences(" Hi.  There! ") == [" Hi.  There! "]
    assert split_sentences("") == [""]


def test_long_text_is_cut_at_the_ends_of_sentences():
    text = "One is here. Two is there! Is three? Four."
    assert split_sentences(text, 30) == ["One is here. Two is there!", "Is three? Four."]
    assert split_sentences(text, 13) == ["One is here.", "Two is there!", "Is three?", "Four."]


def test_quotes_and_brackets_stay_with_the_sentence_they_close():
    text = 'He said "no." She (his wife) said “yes!” They (both) left.)  So.'
    assert split_sentences(text, 27) == [
        'He said "no."',
        "She (his wife) said “yes!”",
        "They (both) left.)  So.",
    ]
    assert split_sentences("他说“你好。”然后走了。她笑了。", 8) == [
        "他说“你好。”",
        "然后走了。",
        "她笑了。",
    ]


def test_numbers_are_not_cut_and_get_no_spaces():
    text = "It cost 10,000.50 at 12:30, then 3.14 more, in all 1,000,000 or so"
    pieces = split_sentences(text, 30)
    assert pieces == ["It cost 10,000.50 at 12:30,", "then 3.14 more,", "in all 1,000,000 or so"]


def test_a_sentence_that_is_too_long_is_cut_at_commas_then_between_words_then_anywhere():
    text = "aaa bbb ccc ddd, eee fff ggg; " + "h" * 25
    pieces = ["aaa bbb", "ccc ddd,", "eee fff", "ggg;", "h" * 10, "h" * 10, "h" * 5]
    assert split_sentences(text, 10) == pieces


def test_paragraphs_are_ends_of_sentences():
    assert split_sentences("A title\n\nAnd a text\nof lines", 12) == [
        "A title",
        "And a text",
        "of lines",
    ]


def test_white_space_alone_is_one_empty_utterance():
    assert split_sentences(" \n" * 500) == [""]


@given(
    st.text(st.sampled_from(list("ab.,!?;: \n\"')”。，…—3é")), max_size=120),
    st.integers(1, 40),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_nothing_but_white_space_is_lost_and_no_piece_is_too_long(text, longest):
    pieces = split_sentences(text, longest)
    assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)
    assert all(len(piece) <= longest for piece in pieces)
    assert len(pieces) == 1 or all(piece == piece.strip() != "" for piece in pieces)
