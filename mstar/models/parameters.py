"""What a model lets its user set: names, types, ranges, defaults, and the errors that say so.

A family declares its parameters once, as data. Python callers, the command line and HTTP forms are
all checked against that one table, before anything is queued.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mstar.errors import InvalidRequest, nearest

__all__ = ["Parameter", "Parameters", "demand", "plain", "positive"]

_NAME_OF = {int: "int", float: "float", bool: "bool", str: "str"}
_BOOLS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLS |= {"false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    Args:
        name: the keyword by which users give it.
        kind: `int`, `float`, `bool`, `str`, or for anything else a function that takes the value
            and returns it in normal form, or raises `ValueError` with what would be accepted.
        default: the value when it is not given.
        low, high: the range of a number; the ends belong to it, `low` unless `low_open`.
        choices: the accepted strings.
        unless: name of a bool parameter which, when true, lets any string in beside `choices`.
        nullable: `None` is a value of its own, as it always is where it is the default. Elsewhere
            it means "not given".
        help: one line for people.
        aliases: other keywords for the same parameter.
        accepts: what is accepted, in words; needed where `kind` is a function.
    """

    name: str
    kind: type | Callable[[Any], Any]
    default: Any = None
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    choices: tuple[str, ...] = ()
    unless: str | None = None
    nullable: bool = False
    help: str = ""
    aliases: tuple[str, ...] = ()
    accepts: str = ""

    def __post_init__(self) -> None:
        if self.default is None:
            object.__setattr__(self, "nullable", True)

    @property
    def type_name(self) -> str:
        """The kind in one word, for tables."""
        return _NAME_OF.get(self.kind, "special")

    @property
    def allowed(self) -> str:
        """What is accepted, in words."""
        return self._sentence() + (", or null" if self.nullable else "")

    def check(self, value: Any, *, free: bool = False) -> Any:
        """`value` in normal form; raises `InvalidRequest` if it is not accepted.

        Args:
            free: accept strings outside `choices`.
        """
        if value is None and self.nullable:
            return None
        item = plain(value)
        if self.kind is bool:
            ok = isinstance(item, bool)
        elif self.kind is int:
            ok = isinstance(item, int) and not isinstance(item, bool) and self._inside(item)
        elif self.kind is float:
            ok = isinstance(item, (int, float)) and not isinstance(item, bool)
            ok = ok and _finite(item) and self._inside(item)
            item = float(item) if ok else item
        elif self.kind is str:
            ok = isinstance(item, str) and (free or not self.choices or item in self.choices)
            item = str(item) if ok else item
        else:
            try:
                return self.kind(item)
            except InvalidRequest:
                raise
            except (TypeError, ValueError) as error:
                allowed = str(error) or f"must be {self.allowed}"
                raise InvalidRequest(self.name, value, allowed) from None
        if not ok:
            hint = nearest(item, self.choices) if isinstance(item, str) else ""
            raise InvalidRequest(self.name, value, f"must be {self.allowed}{hint}")
        return item

    def parse(self, text: str) -> Any:
        """The value that `text`, from a command line or a form, stands for; its range is not
        checked here."""
        if self.kind is str:
            return None if self.nullable and text == "null" else text
        word = text.strip()
        if word.lower() in ("null", "none"):
            return None
        if self.kind is bool and word.lower() in _BOOLS:
            return _BOOLS[word.lower()]
        try:
            if self.kind in (int, float) and "_" not in word:
                return self.kind(word)
        except ValueError:
            pass
        if self.kind in (bool, int, float):
            raise InvalidRequest(self.name, text, f"must be {self.allowed}")
        try:
            return json.loads(word)
        except ValueError:
            return text

    def _inside(self, number: float) -> bool:
        if self.low is not None and (number < self.low or (self.low_open and number == self.low)):
            return False
        return self.high is None or not number > self.high

    def _sentence(self) -> str:
        if self.accepts:
            return self.accepts
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            if not self.choices:
                return "a string"
            names = ", ".join(choice or '"" (none)' for choice in self.choices)
            return f"one of {names}" + (f", or any with {self.unless}=true" if self.unless else "")
        words = "an integer" if self.kind is int else "a number"
        if None not in (self.low, self.high) and not self.low_open:
            return f"{words} from {self.low} to {self.high}"
        low = [] if self.low is None else [f"{'above' if self.low_open else 'at least'} {self.low}"]
        high = [] if self.high is None else [f"at most {self.high}"]
        return " ".join([words, " and ".join(low + high)]).strip()


class Parameters:
    """The table of a model's parameters.

    Args:
        model: the model's name, for messages.
        table: the parameters, in the order in which they are shown.
        check: looks at the complete, otherwise valid values together and raises `InvalidRequest`
            when they contradict each other.
    """

    def __init__(
        self,
        model: str,
        table: Iterable[Parameter] = (),
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.model, self._check = model, check
        self._table: dict[str, Parameter] = {}
        self._by_key: dict[str, Parameter] = {}
        for parameter in table:
            self._table[parameter.name] = parameter
            for key in (parameter.name, *parameter.aliases):
                if key in self._by_key:
                    raise ValueError(f"{model} declares the parameter {key!r} twice")
                self._by_key[key] = parameter
        self.validate({})  # a default that is not accepted is the author's mistake: say so now

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._table.values())

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> Parameter:
        """The parameter with this name or alias."""
        return self._by_key[key]

    def validate(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters by name, in normal form: the given ones checked, the others defaulted.

        `None` for a parameter that is not nullable means that it was not given.

        Raises:
            InvalidRequest: an unknown name, a name given together with its alias, a wrong type, or
                a value out of range.
        """
        given: dict[str, Any] = {}
        key_of: dict[str, str] = {}
        for key, value in kwargs.items():
            parameter = self._find(key, value)
            if value is None and (parameter.default is None or not parameter.nullable):
                continue
            name = parameter.name
            if name in given:
                other = key_of[name]
                raise InvalidRequest(key, value, f"is the same parameter as {other}: give only one")
            given[name], key_of[name] = value, key
        values: dict[str, Any] = {}
        for name, parameter in self._table.items():
            if name not in given:
                given[name] = parameter.default
            if name not in key_of and parameter.default is None:
                values[name] = None
                continue
            free = parameter.unless is not None and plain(given.get(parameter.unless)) is True
            values[name] = parameter.check(given[name], free=free)
        if self._check is not None:
            self._check(values)
        return values

    def parse(self, pairs: Mapping[str, str]) -> dict[str, Any]:
        """Typed values from the strings of a command line or a form, under the keys given.

        Numbers and booleans are read by the declared kind (`"0.5"`, `"true"`), lists and objects
        as JSON, `"null"` as `None`. Pass the result to `validate`.
        """
        return {key: self._find(key, text).parse(text) for key, text in pairs.items()}

    def describe(self) -> list[dict[str, Any]]:
        """One row of plain data per parameter: name, type, default, allowed, help, aliases."""
        return [
            {
                "name": p.name,
                "type": p.type_name,
                "default": p.default,
                "allowed": p.allowed,
                "help": p.help,
                "aliases": list(p.aliases),
            }
            for p in self
        ]

    def _find(self, key: str, value: Any) -> Parameter:
        if key not in self._by_key:
            known = ", ".join(self._table) or "none"
            hint = nearest(str(key), self._by_key)
            raise InvalidRequest(
                str(key), value, f"unknown parameter of {self.model}{hint}; known: {known}"
            )
        return self._by_key[key]


def plain(value: Any) -> Any:
    """A Python number for a numpy (or torch) scalar; anything else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def demand(good: bool, field: str, value: Any, allowed: str) -> None:
    """Refuse a value that is not good."""
    if not good:
        raise InvalidRequest(field, value, allowed)


def positive(field: str, value: Any, most: float) -> float:
    """A number above 0, of Python or numpy.

    Raises:
        InvalidRequest: it is none.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= most:
        raise InvalidRequest(field, value, f"must be above 0, at most {most:g}")
    return float(number)


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond any float
        return False
