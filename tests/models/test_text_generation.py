"""Generated text: whole pieces, ended by stop strings, also while the next step is under way."""

from pathlib import Path

import pytest
import torch

from mstar.engine.checkpoint import Checkpoint
from mstar.engine.kvcache import KVPool
from mstar.engine.lm import LanguageModel
from mstar.engine.runtime import Runtime
from mstar.engine.sampling import SamplingParams
from mstar.engine.weights import load
from mstar.models import registry
from mstar.models.orpheus.llama import Llama, LlamaConfig
from mstar.models.text import TextGeneration

FOLDER = Path(registry.get("orpheus").tiny) / "lm"
PROMPT = [128259, 128000, 128009, 128260, 128261, 128257]


def decode(ids):
    """A letter for each token."""
    return "".join(chr(ord("a") + token % 26) for token in ids)


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_file(FOLDER / "config.json"))
    return load(llama, Checkpoint.open(FOLDER), device="cpu", dtype=torch.float32)


def generate(network, look_ahead, stop=(), **params):
    """The pieces, the finish reason, and how many tokens stay in the cache."""
    lm = LanguageModel("lm", network, KVPool(network.kv_layout, 1024), look_ahead=look_ahead)
    runtime = Runtime()
    lm.bind(runtime.schedule)
    pieces: list[str] = []
    outcome = {}

    async def walk():
        with lm.open_cache() as kv:
            tokens = lm.generate(kv, PROMPT, SamplingParams(temperature=0, **params))
            text = TextGeneration(tokens, decode, stop)
            await text.each(pieces.append)
            outcome.update(reason=text.finish_reason, length=kv.length)
        runtime.stop()

    with torch.inference_mode():
        runtime.spawn(walk())
        runtime.run()
    assert lm.pool.table.used == 0
    return pieces, outcome["reason"], outcome["length"]


@pytest.mark.parametrize("look_ahead", [False, True])
def test_text_ends_before_a_stop_string_and_the_cache_holds_no_surplus(network, look_ahead):
    whole, reason, _ = generate(network, look_ahead, max_tokens=40)
    text = "".join(whole)
    assert (len(text), reason) == (40, "length")
    stop = text[20:23]
    place = text.index(stop)
    pieces, reason, length = generate(network, look_ahead, stop, max_tokens=40)
    assert "".join(pieces) == text[:place]
    assert reason == "stop"
    assert length == len(PROMPT) + place + 2  # the last token of the stop string was never fed


def test_pieces_come_as_soon_as_they_are_certain(network):
    pieces, _, _ = generate(network, False, max_tokens=10)
    assert [len(piece) for piece in pieces] == [1] * 10


def test_text_that_was_held_back_comes_at_the_end(network):
    whole = "".join(generate(network, False, max_tokens=10)[0])
    pieces, reason, _ = generate(network, False, whole[9] + "never", max_tokens=10)
    assert "".join(pieces) == whole
    assert reason == "length"
