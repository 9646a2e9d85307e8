"""`mstar generate`: one request on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from mstar.commands import terminal
from mstar.commands.errors import errors
from mstar.commands.options import (
    File,
    Files,
    Text,
    Texts,
    model_options,
    option,
    unique,
    weight_places,
)
from mstar.commands.outputs import PIPED, STDOUT, as_out, check_outs, modalities
from mstar.errors import InvalidRequest, RequestFailed
from mstar.io.audio import open_wav_header
from mstar.io.heatmap import plot_energy
from mstar.io.plot import plot_actions
from mstar.io.save import HOLDS, encode, modalities_of, save, summary, write_file
from mstar.io.sniff import kind_of
from mstar.models import registry
from mstar.models.card import ModelCard
from mstar.types import AudioChunk, Event, GenerateResult, LatentChunk, TextChunk, fold

_MAP_POINTS = 25  # along each axis


_LIVE = "Print text as it comes, or at the end. With -o -, --stream pipes audio live."


def generate(
    model: Annotated[str, typer.Argument(help="A name from `mstar models`, a folder or a repo.")],
    prompt: Annotated[Text, typer.Argument(help="Text; from stdin if left out or -.")] = None,
    attach: Annotated[
        Files, option("A file to send along; its kind is told by content.", "-a", "--attach")
    ] = None,
    modality: Annotated[
        Text, option("What to make: text, image, audio, action, latent.", "-m", "--modality")
    ] = None,
    out: Annotated[
        Files, option(f"Where to write it: {' '.join(HOLDS)}, or - to pipe.", "-o", "--out")
    ] = None,
    plot: Annotated[
        File, option("A .png that draws the actions, or of world models their costs.")
    ] = None,
    force: Annotated[bool, option("Overwrite output files.", "-f", "--force")] = False,
    settings: Annotated[
        Texts, option("A parameter as key=value; see `mstar models NAME`.", "-s", "--set")
    ] = None,
    weights: Annotated[
        Texts, option("A folder or repo with the weights, or part=folder (repeatable).")
    ] = None,
    device: Annotated[Text, option("cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[Text, option("float32, bfloat16 ...")] = None,
    quantization: Annotated[Text, option("int8 or fp8: weights of 8 bits.")] = None,
    load_format: Annotated[
        str, option("auto, or dummy for random weights without files.")
    ] = "auto",
    model_option: Annotated[
        Texts, option("How to load the model, as key=value (repeatable).", "--option")
    ] = None,
    stream: Annotated[bool | None, option(_LIVE, "--stream/--no-stream")] = None,
    as_json: Annotated[bool, option("Print one JSON object.", "--json")] = False,
    debug: Annotated[bool, option("Show tracebacks of errors.", "--debug")] = False,
) -> None:
    """Run one request: mstar generate orpheus-tiny "Hello there" -o hello.wav"""
    with errors(debug):
        places = weight_places(weights or [])
        card = registry.find(model, places).card
        outs = list(out or [])
        values = _settings(card, settings or [])
        drawn = "latent" if plot is not None and _map_costs(card, values) else "action"
        kinds = modalities(card, modality, outs, plot, drawn)
        check_outs(kinds, outs, force=force, as_json=as_json, plot=plot, drawn=drawn)
        request: dict[str, Any] = {
            **values,
            **_inputs(card, prompt, attach or []),
            "output_modalities": kinds,
        }
        files = [path for path in outs if path != STDOUT]
        piped = kinds[0] if STDOUT in outs else None
        shown = not as_json and not any("text" in modalities_of(path) for path in files)
        text_out = piped == "text" or ("text" in kinds and shown)
        live = request["stream"] = text_out if stream is None else stream
        options: dict[str, Any] = {"device": device, "dtype": dtype, "load_format": load_format}
        if quantization is not None:
            options["quantization"] = quantization
        if model_option:
            options["options"] = model_options(model_option)
        with _engine(model, weights=places, **options) as engine:
            result = _run(engine, request, text=text_out and live, audio=piped == "audio" and live)
        if text_out:
            terminal.write(("" if live else result.text) + "\n" * (not result.text.endswith("\n")))
        elif piped and not (piped == "audio" and live):
            terminal.write(encode(result, PIPED[piped]))
        with as_out():
            written = [str(path) for path in save(result, files, overwrite=force)]
        if plot is not None:
            _draw(result, plot, force, drawn)
            written.append(str(plot))
        if as_json:
            terminal.write(json.dumps({**summary(result), "files": written}) + "\n")
        else:
            for path in written:
                typer.echo(f"wrote {path}", err=True)
        _warn(result)


def _engine(model: str, **options: Any) -> Any:
    from mstar.local import Engine  # this is where torch comes in

    return Engine(model, **options)


def _settings(card: ModelCard, items: list[str]) -> dict[str, Any]:
    """The typed values of `key=value` items, checked against the model's table."""
    for item in items:
        if "=" not in item:
            raise InvalidRequest("--set", item, "must be key=value")
    pairs = unique("--set", (item.split("=", 1) for item in items))
    values = card.parameters.parse(pairs)
    card.parameters.validate(values)
    return values


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
        prompt is None and not texts and "text" in card.inputs and not terminal.is_tty(sys.stdin)
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
    with terminal.progress(enabled=not (text and terminal.is_tty(sys.stdout))) as show:
        for event in events:
            if isinstance(event, TextChunk) and text:
                terminal.write(event.text)
            elif isinstance(event, AudioChunk):
                if audio:
                    head = b"" if started else open_wav_header(event.sample_rate)
                    terminal.write(head + event.pcm.astype("<i2").tobytes())
                    started = True
                seconds += len(event.pcm) / event.sample_rate
                show(f"{seconds:.1f} s of audio")
            yield event


def _map_costs(card: ModelCard, values: dict[str, Any]) -> bool:
    """Whether a plot is a map of what actions cost, and no picture of actions; asks for it."""
    if "energy" not in card.parameters or values.get("plan") or values.get("mpc"):
        return False
    values.setdefault("energy", _MAP_POINTS)
    return True


def _draw(result: GenerateResult, path: Path, force: bool, drawn: str) -> None:
    if drawn == "latent":
        chunk = next(event for event in result.raw if isinstance(event, LatentChunk))
        png = plot_energy(chunk.latents, chunk.metadata["axes"], chunk.metadata["span"])
    elif result.actions is None:
        raise RequestFailed(f"there are no actions to draw (finish_reason={result.finish_reason})")
    else:
        png = plot_actions(result.actions)
    with as_out("--plot"):
        write_file(path, png, overwrite=force)


def _warn(result: GenerateResult) -> None:
    """Say what else the user would only find out by looking at the files."""
    if result.finish_reason == "length":
        typer.echo("warning: cut off at the longest output allowed", err=True)
    if result.audio is not None and len(result.audio) == 0:
        typer.echo(f"warning: no sound (finish_reason={result.finish_reason})", err=True)
