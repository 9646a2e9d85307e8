"""Configs of checkpoints: what counts as left out, and errors that name field, value and need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from mstar.models.fields import check_fields, check_multiple, check_values, known, object_of


@dataclass(frozen=True)
class Sizes:
    width: int = 64
    eps: float = 1e-6
    bias: bool = True
    rates: tuple[int, ...] = (4, 2)
    dim: int | None = None  # is not checked

    def __post_init__(self) -> None:
        check_fields(self)


def test_what_is_unknown_or_null_is_left_out_and_lists_become_tuples():
    config = {"width": 8, "eps": None, "rates": [3], "dim": [5], "other": 1}
    assert known(Sizes, config) == {"width": 8, "rates": (3,), "dim": [5]}
    assert known(Sizes, {"width": [7]}) == {"width": [7]}  # told as it is in the file


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"width": 0}, "width=0: must be an integer of at least 1"),
        ({"width": True}, "width=True: must be an integer of at least 1"),
        ({"eps": 0}, "eps=0: must be a number above 0"),
        ({"eps": float("inf")}, "eps=inf: must be a number above 0"),
        ({"bias": 1}, "bias=1: must be true or false"),
        ({"rates": ()}, r"rates=\[\]: must be a list of integers of at least 1"),
        ({"rates": (3, 0)}, r"rates=\[3, 0\]: must be a list of integers of at least 1"),
    ],
)
def test_fields_are_of_their_type(value: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Sizes(**value)


def test_values_that_must_be_what_they_are():
    config = {"act": "silu", "scale": None}
    check_values(config, act="silu", scale=1, bias=False)
    with pytest.raises(ValueError, match="act='silu': must be 'gelu'"):
        check_values(config, act="gelu")
    with pytest.raises(ValueError, match="width=10: must be a multiple of 4, the heads"):
        check_multiple({"width": 10}, "width", 4, "the heads")
    assert object_of(config, "scale") == object_of(config, "rope") == {}
    with pytest.raises(ValueError, match="act='silu': must be an object"):
        object_of(config, "act")
