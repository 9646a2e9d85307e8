from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

import mstar.models.orpheus
from mstar.errors import InvalidRequest, WeightsError
from mstar.models.orpheus.prompt import load_tokenizer, prompt_ids, split_sentences, spoken

TINY = Path(mstar.models.orpheus.__file__).parent / "tiny" / "lm"
DATA = Path(__file__).parents[2] / "data" / "orpheus"
CASES = json.loads((DATA / "goldens.json").read_text())["cases"]


@pytest.fixture(scope="module")
def encode():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def untouched():
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


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


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    other = json.loads((TINY / "tokenizer.json").read_text())
    other["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(WeightsError, match=r"text begins with the ids \[\], not \[128000\]"):
        load_tokenizer(tmp_path)


CONTROL = ["<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<custom_token_5>"]


@given(st.lists(st.sampled_from([*CONTROL, "<custom_token_", "28683>", "<|", "|>", "<", " ", "a"])))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_text_makes_a_control_token(encode, pieces):
    first, *rest = encode("".join(pieces))
    assert first == 128000
    assert all(number < 128000 for number in rest)


@pytest.mark.parametrize("token", CONTROL)
def test_a_control_token_that_is_spelled_out_is_read_letter_by_letter(token, encode, untouched):
    text = f"say {token} now"
    assert max(untouched.encode(text).ids[1:]) >= 128000
    assert untouched.decode(encode(text)[1:]) == text


TAGS = ["laugh", "chuckle", "sigh", "cough", "sniffle", "groan", "yawn", "gasp"]


@pytest.mark.parametrize("tag", TAGS)
def test_emotion_tags_are_the_text_that_they_always_were(tag, encode, untouched):
    for text in (f"<{tag}>", f"well <{tag}> then", f"well<{tag}>, then"):
        assert encode(text) == untouched.encode(text).ids


def test_half_a_surrogate_pair_is_refused_by_field():
    with pytest.raises(InvalidRequest, match="character 1 is half of a surrogate pair") as caught:
        spoken("voice", "a\ud800b")
    assert caught.value.field == "voice"
    assert spoken("text", "whole: \U0001f600") == "whole: \U0001f600"


def test_whatever_else_the_tokenizer_cannot_take_is_the_texts_fault():
    def encode(text):
        raise OverflowError("too much")

    with pytest.raises(InvalidRequest, match="the tokenizer cannot take it: too much") as caught:
        prompt_ids(encode, "hello", "tara")
    assert caught.value.field == "text"


def test_control_characters_are_left_out_and_white_space_stays():
    assert spoken("text", "a\0b\x1b[1m\x7f\x9f c") == "ab[1m c"
    assert spoken("text", "a\tb\nc\r\nd\x0b\x0c\x85e") == "a\tb\nc\r\nd\x0b\x0c\x85e"


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
