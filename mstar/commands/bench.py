"""`mstar bench`: load on a server, and what its clients felt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mstar.commands import terminal
from mstar.commands.errors import errors
from mstar.commands.options import Count, File, Files, Number, Text, Texts, option, unique
from mstar.errors import InvalidRequest, MStarError

if TYPE_CHECKING:
    from mstar.bench.run import Plan, Run, Show

_ROUTES = ("auto", "generate", "chat", "speech", "images")
_SLO = ("ttft", "itl", "tpot", "e2e", "first_audio", "first_image", "rtf", "underruns")


_KEYS = ["MSTAR_API_KEY", "OPENAI_API_KEY"]


def bench(
    url: Annotated[str, typer.Argument(help="Where the server is: http://localhost:8000")],
    route: Annotated[str, option(f"{', '.join(_ROUTES)}; auto asks the server.")] = "auto",
    concurrency: Annotated[
        Count, option("Requests at a time: 1.", "-c", "--concurrency", min=1)
    ] = None,
    rate: Annotated[Number, option("Instead: requests per second, at random (Poisson).")] = None,
    requests: Annotated[
        Count, option("How many; 5 per slot, at least 20.", "-n", "--requests", min=1)
    ] = None,
    duration: Annotated[Number, option("Start requests for so many seconds.")] = None,
    warmup: Annotated[Count, option("Requests before, not measured; one per slot.", min=0)] = None,
    prompt: Annotated[
        Texts, option("What to send (repeatable, in turn).", "-p", "--prompt")
    ] = None,
    prompts: Annotated[
        File, option("A file of prompts, one a line, or .jsonl with `prompt`.")
    ] = None,
    attach: Annotated[
        Files, option("An image, sound or video to send along.", "-a", "--attach")
    ] = None,
    settings: Annotated[
        Texts, option("A parameter as key=value (JSON or text).", "-s", "--set")
    ] = None,
    model: Annotated[Text, option("Its name; the first that is served.")] = None,
    voice: Annotated[Text, option("Of speech.")] = None,
    modality: Annotated[
        Text, option("What to make: text, audio, image ...", "-m", "--modality")
    ] = None,
    max_tokens: Annotated[Count, option("Longest answer.", min=1)] = None,
    ignore_eos: Annotated[
        bool, option("Go on until --max-tokens: equal lengths.", "--ignore-eos")
    ] = False,
    seed: Annotated[
        Count, option("Repeat arrivals and leavers; request i sends SEED + i as its seed.")
    ] = None,
    sse: Annotated[bool, option("Speech or images as server-sent events.", "--sse")] = False,
    slo: Annotated[Text, option("Limits of goodput, as ttft=0.5,itl=0.05,rtf=1")] = None,
    disconnect: Annotated[
        float, option("Share of clients that leave at random.", min=0, max=1)
    ] = 0.0,
    timeout: Annotated[float, option("Seconds for one request.")] = 600.0,
    api_key: Annotated[Text, option("Sent as Bearer.", envvar=_KEYS)] = None,
    as_json: Annotated[bool, option("Print one JSON object.", "--json")] = False,
    raw: Annotated[File, option("Write every request to this JSONL file.")] = None,
    debug: Annotated[bool, option("Show tracebacks of errors.", "--debug")] = False,
) -> None:
    """Measure a server: mstar bench http://localhost:8000 -c 8 -n 100. Needs the extra `async`.

    Exit code 1: more than half of the requests failed; what was measured is printed even so.
    """
    given = dict(locals())
    with errors(debug):
        limits = _slo(slo)
        _one_of("--route", route, _ROUTES)
        from mstar.bench import need_httpcore

        try:
            need_httpcore()
        except ImportError as error:
            raise MStarError(str(error)) from None
        plan = _plan(**given)
        with _raw_file(raw) as write_raw:
            done = _run(plan)
            for trace in done.traces:
                write_raw(trace)
        _report(done, limits, as_json)


def _plan(
    *, attach: list[Path] | None, prompt: list[str] | None, prompts: Path | None, **given: Any
) -> Plan:
    """What the options ask for."""
    from mstar.bench import prompts as texts
    from mstar.bench.load import Load
    from mstar.bench.routes import Ask
    from mstar.bench.run import Plan

    amounts = (given[name] for name in ("concurrency", "rate", "requests", "duration"))
    load = Load(**_load(*amounts), seed=given["seed"] or 0)
    kinds = (given["modality"] or "").split(",")
    asked = {name: given[name] for name in ("model", "voice", "max_tokens", "ignore_eos", "sse")}
    ask = Ask(
        **asked,
        modalities=tuple(kind.strip() for kind in kinds if kind.strip()),
        extra=_extra(given["settings"] or []),
        attached=tuple(texts.attachments(attach or [])),
    )
    said = [texts.Prompt(text) for text in prompt or []]
    same = {name: given[name] for name in ("url", "route", "seed", "disconnect", "api_key")}
    return Plan(
        **same,
        load=load,
        ask=ask,
        prompts=[*said, *(texts.from_file(prompts) if prompts else [])],
        warmup=(load.concurrency or 1) if given["warmup"] is None else given["warmup"],
        timeout=_positive("--timeout", given["timeout"]),
    )


def _report(done: Run, limits: dict[str, float], as_json: bool) -> None:
    from mstar.bench.report import summary, table

    found = summary(done, limits)
    if as_json:
        for warning in found["warnings"]:
            typer.echo(f"warning: {warning}", err=True)
        terminal.write(json.dumps(found) + "\n")
    else:
        terminal.write(table(found))
    if done.interrupted:
        raise KeyboardInterrupt
    counts = found["requests"]
    if counts["failed"] and not counts["done"]:
        raise MStarError("no request was answered")
    if counts["failed"] > counts["sent"] / 2:
        raise MStarError(f"{counts['failed']} of {counts['sent']} requests failed")


def _run(plan: Plan) -> Run:
    from mstar.bench.run import run

    with _bar(plan) as show:
        return run(plan, show)


@contextmanager
def _bar(plan: Plan) -> Iterator[Show]:
    """How far the run is, once a second; redrawn more often it would disturb the measurement."""
    with terminal.counter(plan.load.requests) as bar:

        def show(stage: str, traces: list[Any]) -> None:
            failed = sum(trace.outcome == "failed" for trace in traces)
            words = f"{stage}: {len(traces)} ended" + (f", {failed} failed" if failed else "")
            bar(words, len(traces) if stage == "running" else 0)

        yield show


def _load(
    concurrency: int | None, rate: float | None, requests: int | None, duration: float | None
) -> dict[str, Any]:
    if rate is not None and concurrency is not None:
        raise InvalidRequest("--rate", rate, "give --rate or --concurrency, not both")
    if rate is not None:
        _positive("--rate", rate)
    if duration is not None:
        _positive("--duration", duration)
    concurrency = None if rate is not None else concurrency or 1
    if requests is None and duration is None:
        requests = max(20, 5 * (concurrency or 0))
    return {
        "concurrency": concurrency,
        "rate": rate,
        "requests": requests,
        "seconds": duration,
    }


def _extra(items: list[str]) -> dict[str, Any]:
    """`key=value` items; a value is JSON where it can be, else text."""
    for item in items:
        if "=" not in item:
            raise InvalidRequest("--set", item, "must be key=value")
    pairs = unique("--set", (item.split("=", 1) for item in items))
    return {key: _value(text) for key, text in pairs.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except ValueError:
        return text


def _slo(text: str | None) -> dict[str, float]:
    limits: dict[str, float] = {}
    for item in (text or "").split(",") if text else []:
        name, _, value = (part.strip() for part in item.partition("="))
        _one_of("--slo", name, _SLO)
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if not limits[name] >= 0:
            raise InvalidRequest("--slo", item, "must be name=seconds")
    return limits


def _one_of(field: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise InvalidRequest(field, value, f"must be one of {', '.join(names)}")


def _positive(field: str, value: float) -> float:
    if not 0 < value < 1e8:
        raise InvalidRequest(field, value, "must be above 0")
    return value


@contextmanager
def _raw_file(path: Path | None) -> Iterator[Any]:
    """Gives a function that writes a trace; the file is opened before anything is sent."""
    if path is None:
        yield lambda trace: None
        return
    from mstar.bench.report import raw

    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise InvalidRequest("--raw", str(path), "exists already") from None
    with file:
        yield lambda trace: file.write(json.dumps(raw(trace)) + "\n")
