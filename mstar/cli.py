"""The command line: `mstar generate` and `mstar models`.

Text goes to stdout as it comes, everything else to stderr. Exit codes: 0 done, 1 failed, 2 asked
for something that cannot be, 130 interrupted. What can be refused is refused before the model is
loaded; torch is imported only when a model is.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import sys
import textwrap
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import mstar
from mstar.errors import InvalidRequest, ModelNotFound, MStarError, RequestFailed
from mstar.io.sniff import kind_of
from mstar.models import registry
from mstar.models.card import ModelCard
from mstar.types import AudioBuffer, AudioChunk, Event, GenerateResult, TextChunk, fold

app = typer.Typer(
    help="Run composite, any-to-any multimodal models on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ARRAYS = ("action", "latent", "audio")
HOLDS = {
    ".wav": ("audio",),
    ".flac": ("audio",),
    ".ogg": ("audio",),
    ".mp3": ("audio",),
    ".png": ("image",),
    ".jpg": ("image",),
    ".jpeg": ("image",),
    ".txt": ("text",),
    ".npy": ARRAYS,
    ".npz": ARRAYS,
    ".json": ("text", "image", "audio", "action", "latent"),
}
STDOUT = Path("-")


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
        typer.Option("-m", "--modality", help="What to make: text,image,audio,action,latent."),
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
            help="Print text as it comes (default), and with -o - audio too; or all at the end.",
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
        values = _settings(card, settings or [])
        request: dict[str, Any] = {
            **_inputs(card, prompt, attach or []),
            **values,
            "output_modalities": kinds,
            "request_id": uuid.uuid4().hex,
        }
        text_out = "text" in kinds and not as_json and not any("text" in _holds(p) for p in outs)
        live_audio = stream is True and STDOUT in outs and kinds == ("audio",)
        with _engine(
            model, weights=places, device=device, dtype=dtype, load_format=load_format
        ) as engine:
            if stream is False:
                result = engine.generate(**request)
                if text_out:
                    _print(result.text)
            else:
                events = engine.generate(**request, stream=True)
                watched = _watch(events, text=text_out, audio=live_audio)
                result = fold(watched, request["request_id"])
        if text_out and not result.text.endswith("\n"):
            _print("\n")
        files = _save(result, kinds, [] if live_audio else outs, force=force)
        if as_json:
            _print(json.dumps(_summary(result, request["request_id"], files)) + "\n")
        else:
            for path in files:
                typer.echo(f"wrote {path}", err=True)


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
    if asked is not None:
        kinds = [kind.strip() for kind in asked.split(",")]
    else:
        kinds = [_holds(path)[0] for path in outs if len(_holds(path)) == 1]
    kinds = list(dict.fromkeys(kinds)) or list(card.default_output)
    for kind in kinds:
        if kind not in card.outputs:
            raise InvalidRequest("modality", kind, f"{card.name} makes {', '.join(card.outputs)}")
    return tuple(kinds)


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
    piped = prompt == "-" or (
        prompt is None and not texts and "text" in card.inputs and not _is_tty(sys.stdin)
    )
    if piped:
        prompt = _decode("stdin", sys.stdin.buffer.read()).rstrip("\r\n") or None
    if prompt is not None:
        texts.insert(0, prompt)
    if not texts and not media:
        how = "as PROMPT, through a pipe" if "text" in card.inputs else "as a file"
        raise InvalidRequest("prompt", None, f"nothing to work on: give it {how} or with --attach")
    return {**media, "text": "\n\n".join(texts)} if texts else dict(media)


def _decode(field: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(field, data[error.start : error.start + 8], "must be UTF-8") from None


def _watch(events: Iterable[Event], *, text: bool, audio: bool) -> Iterator[Event]:
    """Pass the events on; print text, pipe audio, and show on a terminal how far it is."""
    started = False
    with _progress(enabled=not (text and _is_tty(sys.stdout))) as show:
        seconds = 0.0
        try:
            for event in events:
                if isinstance(event, TextChunk) and text:
                    _print(event.text)
                elif isinstance(event, AudioChunk):
                    if audio:
                        head = b"" if started else _open_wav_header(event.sample_rate)
                        _print(head + event.pcm.astype("<i2").tobytes())
                        started = True
                    seconds += len(event.pcm) / event.sample_rate
                    show(f"{seconds:.1f} s of audio")
                yield event
        finally:
            if hasattr(events, "close"):
                events.close()  # cancels the request if it is still running


@contextmanager
def _progress(*, enabled: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, if that is a terminal; gives a function that sets its label."""
    if not enabled or not _is_tty(sys.stderr):
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generating", total=None)
        yield lambda label: progress.update(task, description=f"generating: {label}")


def _print(data: str | bytes) -> None:
    if isinstance(data, str):
        sys.stdout.write(data)
    else:
        sys.stdout.buffer.write(data)
    sys.stdout.flush()


# output files


def _holds(path: Path) -> tuple[str, ...]:
    """The modalities that an output file can hold, by its extension."""
    if path == STDOUT:
        return HOLDS[".json"]
    if path.suffix.lower() not in HOLDS:
        raise InvalidRequest("--out", str(path), f"the extension must be one of {' '.join(HOLDS)}")
    return HOLDS[path.suffix.lower()]


def _check_outs(kinds: tuple[str, ...], outs: list[Path], *, force: bool, as_json: bool) -> None:
    """Refuse outputs that cannot be written, before any work is done."""
    for kind in kinds:
        if kind != "text" and not any(kind in _holds(path) for path in outs):
            fitting = " ".join(suffix for suffix, held in HOLDS.items() if kind in held)
            pipe = {"audio": "WAV", "image": "PNG"}.get(kind, "NPY")
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
        if not any(kind in kinds for kind in _holds(path)):
            raise InvalidRequest("--out", str(path), f"cannot hold {', '.join(kinds)}")
        if outs.count(path) > 1:
            raise InvalidRequest("--out", str(path), "is given twice")
        if path == STDOUT:
            continue
        if not path.parent.is_dir():
            raise InvalidRequest("--out", str(path), f"there is no folder {path.parent}")
        if path.is_dir():
            raise InvalidRequest("--out", str(path), "is a folder")
        if os.path.lexists(path) and not force:
            raise InvalidRequest("--out", str(path), "exists already; --force overwrites it")
        if not os.access(path.parent, os.W_OK):
            raise InvalidRequest("--out", str(path), f"the folder {path.parent} is read-only")


def _save(
    result: GenerateResult, kinds: tuple[str, ...], outs: list[Path], *, force: bool
) -> list[str]:
    """Write the result to every output; returns the paths of the files."""
    contents = []
    for path in outs:
        if path == STDOUT:
            suffix = {"text": ".txt", "audio": ".wav", "image": ".png"}.get(kinds[0], ".npy")
            _print(_encode(result, suffix))
            continue
        contents.append((path, _encode(result, path.suffix.lower())))
        if _holds(path) == ("image",):
            numbered = (path.with_stem(f"{path.stem}-{n}") for n in range(2, 1 << 20))
            free = (p for p in numbered if force or not os.path.lexists(p))
            for index, other in zip(range(1, len(result.images)), free, strict=False):
                contents.append((other, _encode(result, path.suffix.lower(), index)))
    for path, data in contents:
        _write(path, data, force=force)
    return [str(path) for path, _ in contents]


def _write(path: Path, data: bytes, *, force: bool) -> None:
    """Write a whole file or none: through a hidden neighbour that is renamed at the end."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        if os.path.lexists(path) and not force:
            raise InvalidRequest("--out", str(path), "exists now; --force overwrites it")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _encode(result: GenerateResult, suffix: str, index: int = 0) -> bytes:
    """The result as the bytes of a file of that kind."""
    if suffix == ".txt":
        return result.text.encode()
    if suffix == ".json":
        return json.dumps(_everything(result)).encode()
    if suffix in (".npy", ".npz"):
        return _encode_arrays(result, suffix)
    if HOLDS[suffix] == ("audio",):
        if result.audio is None:
            raise _nothing("audio", result)
        return _encode_audio(result.audio, suffix)
    if not result.images:
        raise _nothing("image", result)
    if suffix == ".png":
        return result.images[index]
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(result.images[index])).convert("RGB").save(out, "JPEG", quality=95)
    return out.getvalue()


def _encode_audio(audio: AudioBuffer, suffix: str) -> bytes:
    if suffix == ".wav":
        return audio.to_wav()
    import soundfile

    out = io.BytesIO()
    kind = suffix.removeprefix(".").upper()
    with soundfile.SoundFile(out, "w", audio.sample_rate, 1, format=kind) as file:
        # libsndfile's Vorbis encoder keeps a whole write on the stack: a second at a time
        for start in range(0, len(audio), audio.sample_rate):
            file.write(audio.pcm[start : start + audio.sample_rate])
    return out.getvalue()


def _encode_arrays(result: GenerateResult, suffix: str) -> bytes:
    arrays = {} if result.actions is None else {"actions": result.actions}
    arrays |= {f"latents_{i}": latents for i, latents in enumerate(result.latents)}
    if result.audio is not None:
        arrays["audio"] = result.audio.pcm
    if not arrays:
        raise _nothing("array", result)
    out = io.BytesIO()
    if suffix == ".npy":
        if len(arrays) > 1:
            raise RequestFailed(f"there are {len(arrays)} arrays ({', '.join(arrays)}): use .npz")
        np.save(out, next(iter(arrays.values())))
    else:
        rate = {} if result.audio is None else {"sample_rate": result.audio.sample_rate}
        np.savez(out, **arrays, **rate)
    return out.getvalue()


def _nothing(what: str, result: GenerateResult) -> RequestFailed:
    return RequestFailed(f"the model made no {what} (finish_reason={result.finish_reason})")


def _open_wav_header(sample_rate: int) -> bytes:
    """The header of a WAV of unknown length, as players expect from a pipe."""
    header = bytearray(AudioBuffer(np.zeros(0, np.int16), sample_rate).to_wav())
    header[4:8] = header[40:44] = struct.pack("<I", 0xFFFFFFFF)
    return bytes(header)


def _summary(result: GenerateResult, request_id: str, files: list[str]) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage) if result.usage else None,
        "files": files,
    }


def _everything(result: GenerateResult) -> dict[str, Any]:
    """The result as plain data; images are base64 of PNG, audio is base64 of WAV."""
    data = _summary(result, result.request_id or "", [])
    del data["files"]
    data["images"] = [base64.b64encode(image).decode() for image in result.images]
    data["audio"] = result.audio and {
        "sample_rate": result.audio.sample_rate,
        "wav": base64.b64encode(result.audio.to_wav()).decode(),
    }
    data["actions"] = None if result.actions is None else result.actions.tolist()
    data["latents"] = [latents.tolist() for latents in result.latents]
    return data


# models


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show all about this model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """List the models: what they take and make, their defaults, whether weights are here."""
    with _errors(debug), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = []
        for card in [registry.find(name).card] if name else registry.cards():
            rows.append(_row(card))
            if card.tiny is not None:
                rows.append(_row(card, tiny=True))
        if name in {row["name"] for row in rows}:
            rows = [row for row in rows if row["name"] == name]
        for warning in caught:
            typer.echo(f"warning: {warning.message}", err=True)
        if as_json:
            _print(json.dumps(rows[0] if name else rows, indent=2) + "\n")
        elif name:
            _print(_details(rows[0]))
        else:
            _print(_overview(rows))


def _row(card: ModelCard, *, tiny: bool = False) -> dict[str, Any]:
    """What the table says about one model, as plain data."""
    from mstar.engine.hub import is_cached

    cached = {part: is_cached(repo) for part, repo in card.repos.items()}
    have = [part for part, there in cached.items() if there]
    state = "cached" if all(cached.values()) else f"partly cached ({', '.join(have)})"
    sources = card.tiny_sources() if tiny else card.repos
    return {
        "name": f"{card.name}-tiny" if tiny else card.name,
        "title": f"{card.title} (tiny test checkpoint)" if tiny else card.title,
        "inputs": list(card.inputs),
        "outputs": list(card.outputs),
        "default_output": list(card.default_output),
        "weights": "shipped" if tiny else state if have else "not downloaded",
        "sources": {part: str(source) for part, source in sources.items()},
        "parameters": card.parameters.describe(),
    }


def _overview(rows: list[dict[str, Any]]) -> str:
    table = [("MODEL", "TAKES -> MAKES", "WEIGHTS", "")]
    table += [(row["name"], _flow(row), row["weights"], row["title"]) for row in rows]
    lines = _columns(table)
    text = [lines[0]]
    for row, line in zip(rows, lines[1:], strict=True):
        text.append(line)
        if row["weights"] != "shipped":
            defaults = " ".join(f"{p['name']}={_plain(p['default'])}" for p in row["parameters"])
            text += textwrap.wrap(defaults, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(text) + "\n"


def _details(row: dict[str, Any]) -> str:
    table = [("PARAMETER", "TYPE", "DEFAULT", "ALLOWED")]
    table += [(p["name"], p["type"], _plain(p["default"]), p["allowed"]) for p in row["parameters"]]
    head, *lines = _columns(table)
    text = [f"{row['name']}: {row['title']}", f"{_flow(row)}; weights: {row['weights']}"]
    text += [f"  {part}: {source}" for part, source in row["sources"].items()]
    text += ["", head]
    for parameter, line in zip(row["parameters"], lines, strict=True):
        also = f" (also: {', '.join(parameter['aliases'])})" if parameter["aliases"] else ""
        text += [line, f"    {parameter['help']}{also}"]
    return "\n".join(text) + "\n"


def _flow(row: dict[str, Any]) -> str:
    return f"{', '.join(row['inputs'])} -> {', '.join(row['outputs'])}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _columns(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


# errors


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turn errors that users can understand into one line and an exit code."""
    try:
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
        message = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"error: {message}", err=True)
        refused = isinstance(error, (InvalidRequest, ModelNotFound))
        raise typer.Exit(2 if refused else 1) from None


def _is_tty(stream: Any) -> bool:
    return stream is not None and stream.isatty()


if __name__ == "__main__":
    main()
