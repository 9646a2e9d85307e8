"""Requests made from our own `/openapi.json` and sent to a real server: none may make it fail.

    python -m tests.http.fuzz_openapi --cases 2000 --seed 1

Half of them fit the schema, half do not. A failure is a status of 500 or more, an error of the
server inside a stream, an answer that breaks off, or an error of a shape that its route does not
promise. Each is printed as a curl command.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import requests
import schemathesis
from schemathesis.generation import GenerationMode

from tests import every_modality
from tests.http.conftest import every_site

_TIMEOUT = 20
_ROUND = 50  # cases between two turns of an operation
_SLOW = 5.0  # seconds
_STEERED = 0.6  # share of the cases that are a good request but for a field or two
_GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hello", "model_kwargs": '{"count": 1}'},
    "/v1/audio/speech": {"model": "every", "input": "hello"},
    "/v1/chat/completions": {
        "model": "every",
        "messages": [{"role": "user", "content": "hello"}],
    },
    "/v1/images/generations": {"model": "every", "prompt": "a cat", "size": "32x16"},
    "/v1/images/edits": {"model": "every", "prompt": "a cat", "size": "32x16"},
}
_KEYS = {"message", "type", "param", "code"}


@dataclass
class Report:
    """What was sent and what came back.

    Args:
        statuses: how often each came, by operation.
        failures: one line each, at most a few for one operation and kind.
    """

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many requests were sent."""
        return sum(sum(counts.values()) for counts in self.statuses.values())


def fuzz(url: str, *, cases: int, seed: int) -> Report:
    """Send about `cases` requests to the server at `url`; the same ones for the same seed."""
    document = requests.get(f"{url}/openapi.json", timeout=_TIMEOUT).json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    varied = [operation for operation in operations if operation.body or operation.path_parameters]
    report = Report({operation.label: Counter() for operation in operations})
    numbers = random.Random(seed)
    seen: Counter[tuple[str, str]] = Counter()
    with requests.Session() as session:
        for operation in _turns(operations, varied, cases, report):
            mode = numbers.choice(list(GenerationMode)) if operation in varied else None
            for case in _some_cases(operation, mode, numbers.getrandbits(64)):
                if mode is not None and numbers.random() < _STEERED:
                    _steer(case, numbers)
                status, failure = _send(session, url, case)
                report.statuses[operation.label][status] += 1
                kind = (operation.label, (failure or "")[:60])
                seen[kind] += 1
                if failure and seen[kind] <= 3:
                    command = case.as_curl_command()[:2000]
                    report.failures.append(f"{operation.label}: {failure}\n  {command}")
    return report


def _turns(operations: list[Any], varied: list[Any], cases: int, report: Report) -> Iterator[Any]:
    """Each operation once, then those that vary in turn, until there are enough cases."""
    yield from operations
    while report.cases < cases:
        before = report.cases
        yield from varied
        assert report.cases > before, "no cases can be made"


def _some_cases(operation: Any, mode: GenerationMode | None, seed: int) -> list[Any]:
    """Cases of one operation."""
    made: list[Any] = []
    strategy = operation.as_strategy(generation_mode=mode or GenerationMode.POSITIVE)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=_ROUND if mode else 2,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(case: Any) -> None:
        made.append(case)

    # Not every operation can be asked wrongly: any text is a good path.
    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        collect()
    return made


def _steer(case: Any, numbers: random.Random) -> None:
    """Keep a field or two, and take the rest from a good request, so that the checks are passed."""
    good = _GOOD.get(case.operation.path)
    if good is None or not isinstance(case.body, dict):
        return
    names = sorted(case.body, key=str)
    kept = numbers.sample(names, min(len(names), numbers.randint(0, 2)))
    picture = every_modality.picture(16, 16, numbers.randrange(256))
    if case.operation.path == "/v1/images/edits":
        as_url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        in_json = case.media_type == "application/json"
        given = {"images": [{"image_url": as_url}]} if in_json else {"image": picture}
        good = {**good, **given}
    case.body = {**good, **{name: case.body[name] for name in kept}}


def _send(session: requests.Session, url: str, case: Any) -> tuple[int, str | None]:
    """The status, and what is wrong with the answer."""
    began = time.monotonic()
    try:
        answer = case.call(base_url=url, session=session, timeout=_TIMEOUT, allow_redirects=False)
    except requests.exceptions.InvalidHeader:  # the client refuses to send it
        return 0, None
    except requests.RequestException as error:
        return 0, f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    status, body = answer.status_code, answer.content
    if status >= 500:
        return status, f"{status} {body[:300]!r}"
    if status == 409:  # one follows the other: there is no live request to clash with
        return status, f"409 {body[:300]!r}"
    if b'"server_error"' in body or b'"metadata": {"status": 5' in body:
        return status, f"an error of the server in the stream: {body[-300:]!r}"
    if status >= 400 and not _has_shape(case.operation.path, body):
        return status, f"{status} without an error of the right shape: {body[:300]!r}"
    return status, f"took {seconds:.1f} s" if seconds > _SLOW else None


def _has_shape(path: str, body: bytes) -> bool:
    """Whether an error is one of OpenAI's, or one of the native route's."""
    try:
        answer = json.loads(body)
    except ValueError:
        return False
    if not path.startswith("/v1/"):
        return set(answer) == {"detail"} and isinstance(answer["detail"], str)
    error = answer.get("error", {})
    words = (error.get("param"), error.get("code"))
    return set(error) == _KEYS and all(word is None or isinstance(word, str) for word in words)


def main() -> int:
    """Fuzz a server of the test model; 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("python_multipart").setLevel("ERROR")
    began = time.monotonic()
    with every_site(served_model_name=["org/name"], max_body_mb=1, request_timeout=10) as site:
        report = fuzz(site.url, cases=options.cases, seed=options.seed)
    for label, counts in report.statuses.items():
        shown = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
        print(f"{label:32} {shown}")
    print(f"{report.cases} cases in {time.monotonic() - began:.0f} s")
    for failure in report.failures:
        print(f"FAILED {failure}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
