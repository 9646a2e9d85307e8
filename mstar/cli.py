"""The command line: `mstar generate`, `mstar serve` and `mstar models`.

Text goes to stdout as it comes, everything else to stderr. Exit codes: 0 done, 1 failed, 2 asked
for something that cannot be, 130 interrupted. What can be refused is refused before the model is
loaded; torch is imported only when a model is.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import mstar
from mstar.errors import InvalidRequest, ModelNotFound, MStarError
from mstar.io.audio import open_wav_header
from mstar.io.save import HOLDS, check_path, encode, modalities_of, save, summary
from mstar.io.sniff import kind_of
from mstar.models import listing, registry
from mstar.models.card import ModelCard
from mstar.types import AudioChunk, Event, GenerateResult, TextChunk, fold

app = typer.Typer(
    help="Run composite, any-to-any multimodal models on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STDOUT = Path("-")
# What a pipe gets, as the extension of a file.
PIPED = {"text": ".txt", "image": ".png", "audio": ".wav", "action": ".npy", "latent": ".npy"}


def main() -> None:
    """The `mstar` command."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"mstar {mstar.__version__}")
        raise typer.Exit


# generate


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A name from `mstar models`, a folder or a repo.")],
    prompt: Annotated[str | None, typer.Argument(help="Text; from stdin if left out or -.")] = None,
    attach: Annotated[
        list[Path] | None,
        typer.Option("-a", "--attach", help="A file to send along; its kind is told by content."),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option("-m", "--modality", help="What to make: text, image, audio, action, latent."),
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option("-o", "--out", help=f"Where to write it: {' '.join(HOLDS)}, or - to pipe."),
    ] = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Overwrite output files.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("-s", "--set", help="A parameter as key=value; see `mstar models NAME`."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="A folder or repo with the weights, or part=folder (repeatable)."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...")] = None,
    load_format: Annotated[
        str, typer.Option(help="auto, or dummy for random weights without files.")
    ] = "auto",
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print text as it comes, or at the end. With -o -, --stream pipes audio live.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Run one request: mstar generate orpheus-tiny "Hello there" -o hello.wav"""
    with _errors(debug):
        places = _weights(weights or [])
        card = registry.find(model, places).card
        outs = list(out or [])
        kinds = _modalities(card, modality, outs)
        _check_outs(kinds, outs, force=force, as_json=as_json)
        request: dict[str, Any] = {
            **_settings(card, settings or []),
            **_inputs(card, prompt, attach or []),
            "output_modalities": kinds,
        }
        files = [path for path in outs if path != STDOUT]
        piped = kinds[0] if STDOUT in outs else None
        shown = not as_json and not any("text" in modalities_of(path) for path in files)
        text_out = piped == "text" or ("text" in kinds and shown)
        live = request["stream"] = text_out if stream is None else stream
        options = {"device": device, "dtype": dtype, "load_format": load_format}
        with _engine(model, weights=places, **options) as engine:
            result = _run(engine, request, text=text_out and live, audio=piped == "audio" and live)
        if text_out:
            _print(("" if live else result.text) + "\n" * (not result.text.endswith("\n")))
        elif piped and not (piped == "audio" and live):
            _print(encode(result, PIPED[piped]))
        with _as_out():
            written = [str(path) for path in save(result, files, overwrite=force)]
        if as_json:
            _print(json.dumps({**summary(result), "files": written}) + "\n")
        else:
            for path in written:
                typer.echo(f"wrote {path}", err=True)
        _warn(result)


def _engine(model: str, **options: Any) -> Any:
    from mstar.local import Engine  # this is where torch comes in

    return Engine(model, **options)


def _weights(items: list[str]) -> dict[str, str] | str | None:
    """`["PLACE"]` as one place, `["part=PLACE", ...]` as a dict."""
    pairs = [re.fullmatch(r"([A-Za-z_]\w*)=(.+)", item) for item in items]
    if not items:
        return None
    if len(items) == 1 and (pairs[0] is None or Path(items[0]).exists()):
        return items[0]
    if not all(pairs):
        raise InvalidRequest("--weights", items, "give one place, or part=place for every one")
    return _unique("--weights", (pair.groups() for pair in pairs if pair))


def _settings(card: ModelCard, items: list[str]) -> dict[str, Any]:
    """The typed values of `key=value` items, checked against the model's table."""
    for item in items:
        if "=" not in item:
            raise InvalidRequest("--set", item, "must be key=value")
    pairs = _unique("--set", (item.split("=", 1) for item in items))
    values = card.parameters.parse(pairs)
    card.parameters.validate(values)
    return values


def _unique(field: str, pairs: Iterable[Iterable[str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidRequest(field, f"{key}={value}", f"{key} is given twice")
        found[key] = value
    return found


def _modalities(card: ModelCard, asked: str | None, outs: list[Path]) -> tuple[str, ...]:
    """What to make: as asked, else what the output files hold, else the model's default."""
    makes = f"{card.name} makes {', '.join(card.outputs)}"
    if asked is not None:
        kinds = [kind.strip() for kind in asked.split(",")]
        for kind in kinds:
            if kind not in card.outputs:
                raise InvalidRequest("--modality", kind, makes)
    else:
        kinds = [_held(path)[0] for path in outs if len(_held(path)) == 1]
        for path in outs:
            if not set(_held(path)) & set(card.outputs):
                held = ", ".join(_held(path))
                raise InvalidRequest("--out", str(path), f"such a file holds {held}; {makes}")
    return tuple(dict.fromkeys(kinds)) or card.default_output


def _held(path: Path) -> tuple[str, ...]:
    """The modalities that an output can hold."""
    if path == STDOUT:
        return tuple(PIPED)
    with _as_out():
        return modalities_of(path)


def _check_outs(kinds: tuple[str, ...], outs: list[Path], *, force: bool, as_json: bool) -> None:
    """Refuse outputs that cannot be written, before any work is done."""
    for kind in kinds:
        if kind != "text" and not any(kind in _held(path) for path in outs):
            fitting = " ".join(suffix for suffix, held in HOLDS.items() if kind in held)
            pipe = PIPED[kind].removeprefix(".").upper()
            raise InvalidRequest(
                "--out",
                None,
                f"{kind} needs a file to go to: -o NAME with one of {fitting}; "
                f"or -o - to send {pipe} bytes to a pipe",
            )
    if STDOUT in outs and (as_json or len(kinds) > 1):
        raise InvalidRequest("--out", "-", "a pipe takes one modality, and no --json beside it")
    if STDOUT in outs and kinds != ("text",) and _is_tty(sys.stdout):
        raise InvalidRequest("--out", "-", "stdout is a terminal; send it to a pipe or a file")
    for path in outs:
        if not any(kind in kinds for kind in _held(path)):
            raise InvalidRequest("--out", str(path), f"cannot hold {', '.join(kinds)}")
        if outs.count(path) > 1:
            raise InvalidRequest("--out", str(path), "is given twice")
        if path != STDOUT:
            with _as_out():
                check_path(path, overwrite=force)


@contextmanager
def _as_out() -> Iterator[None]:
    """Name the option in the errors about an output file."""
    try:
        yield
    except FileExistsError as error:
        hint = "exists already; --force overwrites it"
        raise InvalidRequest("--out", error.filename, hint) from None
    except InvalidRequest as error:
        if error.field not in ("path", "format"):
            raise
        raise InvalidRequest("--out", error.value, error.allowed) from None


def _inputs(card: ModelCard, prompt: str | None, attached: list[Path]) -> dict[str, Any]:
    """Prompt and attachments as arguments of `generate`."""
    media: dict[str, list[tuple[str, bytes]]] = {}
    texts = []
    for path in attached:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidRequest("--attach", str(path), error.strerror or str(error)) from None
        kind = kind_of(data, path.name)
        if kind not in card.inputs:
            takes = f"{card.name} takes {', '.join(card.inputs)}"
            raise InvalidRequest("--attach", str(path), f"holds {kind or 'unknown data'}; {takes}")
        if kind == "text":
            texts.append(_decode("--attach", data))
        else:
            media.setdefault("images" if kind == "image" else kind, []).append((path.name, data))
    if prompt == "-" or (
        prompt is None and not texts and "text" in card.inputs and not _is_tty(sys.stdin)
    ):
        data = sys.stdin.buffer.read() if sys.stdin is not None else b""
        prompt = _decode("stdin", data).rstrip("\r\n")
    texts = [text for text in (prompt, *texts) if text and not text.isspace()]
    if not texts and not media:
        how = "as PROMPT, through a pipe" if "text" in card.inputs else "as a file"
        raise InvalidRequest("prompt", None, f"nothing to work on: give it {how} or with --attach")
    return {**media, "text": "\n\n".join(texts)} if texts else dict(media)


def _decode(field: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(field, data[error.start : error.start + 8], "must be UTF-8") from None


def _run(engine: Any, request: dict[str, Any], *, text: bool, audio: bool) -> GenerateResult:
    """The result of a request, shown while it is made; left early, it is cancelled."""
    handle = engine.submit(**request)
    try:
        with closing(_shown(handle, text=text, audio=audio)) as events:
            return fold(events, handle.request_id)
    finally:
        handle.cancel()


def _shown(events: Iterable[Event], *, text: bool, audio: bool) -> Iterator[Event]:
    """Pass the events on; print text, pipe audio, and show on a terminal how far it is."""
    seconds = 0.0
    started = False
    with _progress(enabled=not (text and _is_tty(sys.stdout))) as show:
        for event in events:
            if isinstance(event, TextChunk) and text:
                _print(event.text)
            elif isinstance(event, AudioChunk):
                if audio:
                    head = b"" if started else open_wav_header(event.sample_rate)
                    _print(head + event.pcm.astype("<i2").tobytes())
                    started = True
                seconds += len(event.pcm) / event.sample_rate
                show(f"{seconds:.1f} s of audio")
            yield event


@contextmanager
def _progress(*, enabled: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, if that is a terminal; gives a function that sets its label."""
    if not enabled or not _is_tty(sys.stderr):
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("generating", total=None)
        yield lambda label: progress.update(task, description=f"generating: {label}")


def _print(data: str | bytes) -> None:
    if sys.stdout is None:
        raise OSError("standard output is closed")
    if isinstance(data, str):
        data = data.encode(sys.stdout.encoding or "utf-8", "replace")
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _warn(result: GenerateResult) -> None:
    """Say what else the user would only find out by looking at the files."""
    if result.finish_reason == "length":
        typer.echo("warning: cut off at the longest output allowed", err=True)
    if result.audio is not None and len(result.audio) == 0:
        typer.echo(f"warning: no sound (finish_reason={result.finish_reason})", err=True)


# serve


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A name from `mstar models`, a folder or a repo.")],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="A folder or repo with the weights, or part=folder (repeatable)."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...")] = None,
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights.")] = "auto",
    kv_tokens: Annotated[int | None, typer.Option(help="Size of the KV cache in tokens.")] = None,
    memory_fraction: Annotated[
        float, typer.Option(help="Share of the free device memory for the KV cache.")
    ] = 0.9,
    max_batch: Annotated[int, typer.Option(help="Most sequences in one batch.")] = 64,
    max_running: Annotated[int, typer.Option(help="Most requests that run at a time.")] = 256,
    max_queue: Annotated[int, typer.Option(help="Most requests that wait; then 503.")] = 1024,
    max_body_mb: Annotated[float, typer.Option(help="Longest request body, in MiB.")] = 64,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds that any request may take.")
    ] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests have after SIGTERM.", min=0)
    ] = 30.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="MSTAR_API_KEY", help="Clients must send it as Bearer.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Another name of the model (repeatable).")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may call (repeatable).")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_stats: Annotated[
        float, typer.Option(help="Seconds between two lines of figures; 0 for none.", min=0)
    ] = 0.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Serve a model over HTTP: the native route and OpenAI's. Needs `mstar[server]`."""
    with _errors(debug):
        places = _weights(weights or [])
        registry.find(model, places)
        try:
            from mstar.http import serve as run
            from mstar.http.server import Listening
        except ModuleNotFoundError as error:
            raise MStarError(str(error)) from None
        run(
            model,
            listening=Listening(host, port, log_level, drain_timeout, log_stats),
            engine_options={
                "weights": places,
                "device": device,
                "dtype": dtype,
                "load_format": load_format,
                "kv_tokens": kv_tokens,
                "memory_fraction": memory_fraction,
                "max_batch": max_batch,
                "max_running": max_running,
                "max_queue": max_queue,
            },
            app_options={
                "served_model_name": served_model_name or (),
                "api_key": api_key,
                "max_body_mb": max_body_mb,
                "request_timeout": request_timeout,
                "cors_origins": cors_origin or (),
            },
        )


# models


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show all about this model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """List the models: what they take and make, their defaults, whether weights are here."""
    with _errors(debug):
        rows = []
        for card in [registry.find(name).card] if name else registry.cards():
            rows.append(listing.row(card))
            if card.tiny is not None:
                rows.append(listing.row(card, tiny=True))
        if name in {row["name"] for row in rows}:
            rows = [row for row in rows if row["name"] == name]
        if as_json:
            _print(json.dumps(rows[0] if name else rows, indent=2) + "\n")
        elif name:
            _print(listing.details(rows[0]))
        else:
            _print(listing.overview(rows))


# errors


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Make warnings, and errors that users can understand, one line; set the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
            yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader has gone: say nothing, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (MStarError, OSError) as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {_in_words(error)}", err=True)
        refused = isinstance(error, (InvalidRequest, ModelNotFound))
        raise typer.Exit(2 if refused else 1) from None


def _in_words(error: Exception) -> str:
    text = str(error)
    if isinstance(error, InvalidRequest) and error.value is None:
        text = f"{error.field}: {error.allowed}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def _is_tty(stream: Any) -> bool:
    return stream is not None and stream.isatty()


if __name__ == "__main__":
    main()
