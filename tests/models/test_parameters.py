"""The parameter table: defaults, aliases, types, ranges, and errors that name the field."""

import subprocess
import sys

import numpy as np
import pytest

from mstar.errors import InvalidRequest
from mstar.models.orpheus.card import CARD, MOST_TOKENS
from mstar.models.parameters import Parameter, Parameters


def even(value):
    if not isinstance(value, int) or value % 2:
        raise ValueError("must be even")
    return value


TABLE = Parameters(
    "toy",
    [
        Parameter("scale", float, 1.0, low=0, high=2, low_open=True),
        Parameter("steps", int, 4, low=1, high=8, aliases=("num_steps",)),
        Parameter("loud", bool, False),
        Parameter("mode", str, "a", choices=("a", "b"), unless="loud"),
        Parameter("note", str, ""),
        Parameter("cap", int, 5, nullable=True),
        Parameter("pairs", even, nullable=True, accepts="an even number"),
    ],
)


def test_an_empty_request_gets_every_default():
    values = TABLE.validate({})
    assert list(values) == [p.name for p in TABLE]
    assert values["scale"] == 1.0
    assert values["cap"] == 5
    assert values["pairs"] is None


def test_an_alias_means_the_parameter():
    assert TABLE.validate({"num_steps": 2})["steps"] == 2


def test_a_name_together_with_its_alias_is_refused():
    with pytest.raises(InvalidRequest, match="same parameter as steps") as info:
        TABLE.validate({"steps": 2, "num_steps": 2})
    assert info.value.field == "num_steps"


def test_none_means_not_given_unless_it_is_a_value():
    assert TABLE.validate({"steps": None, "num_steps": 3})["steps"] == 3
    assert TABLE.validate({"scale": None})["scale"] == 1.0
    assert TABLE.validate({"cap": None})["cap"] is None


def test_an_unknown_name_is_refused_with_the_nearest_and_all_known():
    with pytest.raises(InvalidRequest) as info:
        TABLE.validate({"step": 3})
    assert (info.value.field, info.value.value) == ("step", 3)
    assert "unknown parameter of toy; did you mean 'steps'?; known: scale, steps" in str(info.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", True),
        ("steps", 2.0),
        ("steps", "2"),
        ("steps", 0),
        ("steps", 9),
        ("scale", "1"),
        ("scale", False),
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("scale", 10**400),
        ("scale", 0),
        ("scale", 2.1),
        ("scale", np.float32("nan")),
        ("scale", np.ones(1)),
        ("loud", 1),
        ("loud", "true"),
        ("mode", "c"),
        ("mode", 1),
        ("note", 3),
        ("note", b"bytes"),
        ("pairs", 3),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest) as info:
        TABLE.validate({name: value})
    assert info.value.field == name
    assert info.value.value is value
    assert str(info.value).startswith(f"{name}=")


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("steps", np.int64(8), 8),
        ("scale", 2, 2.0),
        ("scale", np.float16(0.5), 0.5),
        ("loud", np.bool_(True), True),
        ("mode", np.str_("b"), "b"),
        ("pairs", np.int32(4), 4),
    ],
)
def test_numpy_scalars_become_plain_python(name, value, kept):
    got = TABLE.validate({name: value})[name]
    assert got == kept
    assert type(got) is type(kept)


def test_one_parameter_can_open_the_choices_of_another():
    assert TABLE.validate({"mode": "zzz", "loud": True})["mode"] == "zzz"
    assert TABLE.validate({"mode": "zzz", "loud": np.bool_(True)})["mode"] == "zzz"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scale", "a number above 0 and at most 2"),
        ("steps", "an integer from 1 to 8"),
        ("loud", "true or false"),
        ("mode", "one of a, b, or any with loud=true"),
        ("cap", "an integer, or null"),
        ("pairs", "an even number, or null"),
    ],
)
def test_the_table_says_what_is_allowed(name, words):
    row = next(row for row in TABLE.describe() if row["name"] == name)
    assert row["allowed"] == words


def test_text_is_read_by_the_declared_kind():
    text = {
        "scale": "0.5",
        "num_steps": "3",
        "loud": "TRUE",
        "mode": "b",
        "note": "7",
        "pairs": "2",
    }
    values = {"scale": 0.5, "num_steps": 3, "loud": True, "mode": "b", "note": "7", "pairs": 2}
    assert TABLE.parse(text) == values
    assert TABLE.parse({"cap": "null", "note": "null", "loud": "off"}) == {
        "cap": None,
        "note": "null",
        "loud": False,
    }


@pytest.mark.parametrize(
    ("name", "text"), [("steps", "3.5"), ("steps", "1_0"), ("scale", "x"), ("loud", "maybe")]
)
def test_text_that_is_not_of_the_kind_is_refused(name, text):
    with pytest.raises(InvalidRequest, match=f"^{name}="):
        TABLE.parse({name: text})


def test_text_for_an_unknown_name_is_refused():
    with pytest.raises(InvalidRequest, match="did you mean 'scale'"):
        TABLE.parse({"scal": "1"})


def test_not_a_number_as_text_is_caught_by_validation():
    with pytest.raises(InvalidRequest, match="scale"):
        TABLE.validate(TABLE.parse({"scale": "nan"}))


def test_a_table_with_a_name_twice_or_a_bad_default_does_not_build():
    with pytest.raises(ValueError, match="twice"):
        Parameters("toy", [Parameter("a", int, 1), Parameter("b", int, 1, aliases=("a",))])
    with pytest.raises(InvalidRequest):
        Parameters("toy", [Parameter("a", int, 0, low=1)])


# Orpheus


def orpheus(**kwargs):
    return CARD.parameters.validate(kwargs)


def test_orpheus_has_the_published_defaults():
    values = orpheus()
    assert values["voice"] == "tara"
    assert (values["temperature"], values["top_p"], values["top_k"]) == (0.6, 0.8, 0)
    assert values["repetition_penalty"] == 1.3
    assert values["max_output_tokens"] is None  # 4096, or what there is room for
    assert MOST_TOKENS == 4096
    assert (values["seed"], values["stop"], values["logit_bias"]) == (None, None, None)
    assert (values["codec_noise"], values["lookahead"]) == ("seeded", 3)
    assert values["split_text"] is True
    assert values["ignore_eos"] is False


def test_orpheus_lists_its_voices_when_it_does_not_know_one():
    with pytest.raises(InvalidRequest, match="tara, leah, jess, leo, dan, mia, zac, zoe, julia"):
        orpheus(voice="bob")
    assert orpheus(voice="")["voice"] == ""
    assert orpheus(voice="bob", force_voice=True)["voice"] == "bob"


@pytest.mark.parametrize("alias", ["max_tokens", "max_new_tokens"])
def test_orpheus_knows_the_common_names_of_the_token_limit(alias):
    assert orpheus(**{alias: 7})["max_output_tokens"] == 7


@pytest.mark.parametrize(
    ("stop", "ids"),
    [
        (128258, [128258]),
        ("<custom_token_2>", [128258]),
        (["<custom_token_5>", 7, "<|eot_id|>"], [128261, 7, 128009]),
        (np.array([1, 2]), [1, 2]),
        ([], []),
    ],
)
def test_stop_tokens_become_ids(stop, ids):
    assert orpheus(stop=stop)["stop"] == ids


@pytest.mark.parametrize(
    "stop", ["word", -1, 156940, True, 1.5, "<custom_token_99999>", list(range(17)), {"a": 1}]
)
def test_what_is_no_stop_token_is_refused(stop):
    with pytest.raises(InvalidRequest, match=r"^stop="):
        orpheus(stop=stop)


def test_stop_and_bias_can_come_as_text():
    pairs = {"stop": '[5, "<custom_token_2>"]', "logit_bias": '{"12": -100, "13": 0.5}'}
    values = CARD.parameters.validate(CARD.parameters.parse(pairs))
    assert values["stop"] == [5, 128258]
    assert values["logit_bias"] == {12: -100.0, 13: 0.5}
    assert CARD.parameters.parse({"stop": "<custom_token_2>"}) == {"stop": "<custom_token_2>"}


@pytest.mark.parametrize("bias", [[1], {1: 101}, {"x": 1}, {1: "2"}, {1: 1, "1": 2}, {-1: 0}])
def test_a_bias_that_makes_no_sense_is_refused(bias):
    with pytest.raises(InvalidRequest, match=r"^logit_bias="):
        orpheus(logit_bias=bias)


def test_orpheus_refuses_a_minimum_above_the_maximum():
    with pytest.raises(InvalidRequest, match="must not exceed max_output_tokens=5"):
        orpheus(min_tokens=6, max_tokens=5)


def test_validating_twice_changes_nothing():
    values = orpheus(stop="<custom_token_9>", logit_bias={"3": 1}, seed=1)
    assert orpheus(**values) == values


def test_cards_and_registry_need_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import mstar.client, mstar.io.sniff\n"
        "from mstar.models import registry\n"
        "assert registry.find('orpheus-tiny').tiny\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
