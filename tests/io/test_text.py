"""Streaming text: whole characters, nothing of a stop string, the same text as in one go."""

import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from mstar.io.text import TextStream
from mstar.models import registry

TEXT = "Héllo wörld, 你好 🙂👍🏽! It's \ufffd fine… a\u0301 end"


@pytest.fixture(scope="module")
def tokenizer():
    folder = Path(registry.get("orpheus").tiny) / "lm"
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def decode(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    out = []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


def bytes_decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", [TEXT, "", " ", "plain", "🙂", "日本語のテキスト"])
def test_the_pieces_are_the_text(tokenizer, decode, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(TextStream(decode), ids)) == decode(ids)


def test_a_character_split_over_tokens_comes_whole():
    out = pieces(TextStream(bytes_decode), list("a🙂é".encode()))
    assert out == ["a", "", "", "", "🙂", "", "é", ""]


def test_a_character_that_is_never_finished_comes_at_the_end():
    out = pieces(TextStream(bytes_decode), [*b"ok", 0xF0, 0x9F])
    assert "".join(out).startswith("ok")
    assert out[-1] != ""


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    assert "b" in "".join(pieces(TextStream(bytes_decode), [0xFF, *b"a" * 5, *b"b"])[:-1])


@pytest.mark.parametrize("stop", ["END", ["xx", "END"], ["E", "END"]])
def test_text_ends_before_the_stop_string(stop):
    stream = TextStream(bytes_decode, stop)
    assert "".join(pieces(stream, list(b"some text END and more"))) == "some text "
    assert stream.stopped
    assert stream.push(ord("z")) == stream.finish() == ""


def test_what_only_looks_like_a_stop_string_is_given_after_all():
    stream = TextStream(bytes_decode, "ENDE")
    assert "".join(pieces(stream, list(b"an EN, an END. EEND"))) == "an EN, an END. EEND"
    assert not stream.stopped


def test_the_first_of_several_stop_strings_counts():
    stream = TextStream(bytes_decode, ["late", "so"])
    assert "".join(pieces(stream, list(b"not so late"))) == "not "


def test_stop_strings_that_span_pieces_and_overlap_are_found():
    chance = random.Random(1)
    for _ in range(300):
        text = "".join(chance.choice("ab") for _ in range(30))
        stops = ["".join(chance.choice("ab") for _ in range(chance.randint(2, 5)))]
        stream = TextStream(bytes_decode, stops)
        out = "".join(pieces(stream, list(text.encode())))
        assert out == text.split(stops[0])[0]
        assert stream.stopped == (stops[0] in text)
