"""A config.json that cannot be Orpheus is refused when the model is loaded, by name."""

import contextlib
import json
import math
from pathlib import Path

import pytest

from mstar import Engine
from mstar.errors import WeightsError
from mstar.models import orpheus
from mstar.models.orpheus.networks import networks

TINY = Path(orpheus.__file__).parent / "tiny"
CONFIGS = {part: json.loads((TINY / part / "config.json").read_text()) for part in ("lm", "snac")}
LLAMA3 = CONFIGS["lm"]["rope_scaling"]


@pytest.fixture
def folders(tmp_path):
    """Writes the config.json of both parts, that of `part` changed; None leaves a field out."""

    def write(part="lm", **change):
        for name, config in CONFIGS.items():
            changed = {**config, **change} if name == part else config
            kept = {key: value for key, value in changed.items() if value is not None}
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps(kept))
        return {name: tmp_path / name for name in CONFIGS}

    return write


def test_the_published_layout_is_taken(folders):
    llama, snac = networks(folders())
    assert llama.vocab_size == 156940
    assert snac.config.vq_strides == (4, 2, 1)
    assert all(parameter.is_meta for parameter in [*llama.parameters(), *snac.parameters()])


def test_a_vocabulary_that_ends_with_the_last_code_is_enough(folders):
    assert networks(folders(vocab_size=156938))[0].vocab_size == 156938


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("lm", {"vocab_size": 128256}, "vocab_size=128256, and it must be 156938 or more"),
        ("lm", {"vocab_size": 156937}, "vocab_size=156937, and it must be 156938 or more"),
        ("snac", {"codebook_size": 2048}, "codebook_size=2048, and it must be 4096"),
        ("snac", {"vq_strides": [8, 4, 2, 1]}, r"vq_strides=\[8, 4, 2, 1\], .* \[4, 2, 1\]"),
        ("snac", {"vq_strides": [4, 4, 1]}, r"vq_strides=\[4, 4, 1\], and it must be \[4, 2, 1\]"),
        ("snac", {"vq_strides": [1]}, r"vq_strides=\[1\], and it must be \[4, 2, 1\]"),
    ],
)
def test_networks_without_the_audio_codes_of_orpheus_are_refused(folders, part, change, says):
    with pytest.raises(WeightsError, match=f"{part}/config.json is not Orpheus': {says}"):
        networks(folders(part, **change))


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("lm", {"model_type": "qwen2"}, "model_type='qwen2': must be 'llama'"),
        ("lm", {"num_attention_heads": 0}, "num_attention_heads=0: must be an integer of at"),
        ("lm", {"num_attention_heads": None}, "it has no num_attention_heads"),
        ("lm", {"hidden_size": None, "vocab_size": None}, "it has no hidden_size, vocab_size"),
        ("lm", {"num_hidden_layers": "2"}, "num_hidden_layers='2': must be an integer"),
        ("lm", {"num_key_value_heads": 3}, "num_key_value_heads=3: must divide the 4 heads"),
        ("lm", {"head_dim": 15}, "head_dim=15: must be even"),
        ("lm", {"rms_norm_eps": -1}, "rms_norm_eps=-1: must be a number above 0"),
        ("lm", {"rope_theta": "big"}, "rope_theta='big': must be a number above 0"),
        ("lm", {"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
        ("lm", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type='dynamic': must be one of"),
        ("lm", {"rope_scaling": ["llama3"]}, r"rope_scaling=\['llama3'\]: must be an object"),
        ("lm", {"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ("lm", {"rope_scaling": {**LLAMA3, "factor": 0}}, "factor=0 .* a number above 0"),
        ("snac", {"decoder_rates": None}, "it has no decoder_rates"),
        ("snac", {"decoder_rates": [8, 0]}, r"decoder_rates=\[8, 0\]: must be a list of integers"),
        ("snac", {"vq_strides": []}, r"vq_strides=\[\]: must be a list of integers"),
        ("snac", {"decoder_dim": 100}, "decoder_dim=100: must be a multiple of 16"),
        ("snac", {"noise": "yes"}, "noise='yes': must be true or false"),
        ("snac", {"attn_window_size": 32}, "attn_window_size=32"),
    ],
)
def test_values_that_no_network_has_are_refused_with_file_and_field(folders, part, change, says):
    with pytest.raises(WeightsError, match=f"cannot use .*{part}/config.json: {says}"):
        networks(folders(part, **change))


@pytest.mark.parametrize("part", ["lm", "snac"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no .*config.json"),
        (b"{", "config.json: it is not JSON"),
        (b"\xff\xfe", "config.json: it is not JSON"),
        (b"[]", "config.json: it must hold an object, not a list"),
    ],
)
def test_a_file_that_is_no_config_is_refused(folders, part, content, says):
    where = folders()
    file = where[part] / "config.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(WeightsError, match=says):
        networks(where)


@pytest.mark.parametrize(
    ("part", "field"), [(part, field) for part, config in CONFIGS.items() for field in config]
)
def test_no_value_of_any_field_gives_another_error(folders, part, field):
    for value in (None, "x", "", 0, -1, 1, 3, 0.5, math.nan, True, [], [0], {}, {"factor": "x"}):
        with contextlib.suppress(WeightsError):
            networks(folders(part, **{field: value}))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_engine_refuses_them_before_it_reads_weights(folders, load_format):
    with pytest.raises(WeightsError, match="codebook_size=1024, and it must be 4096"):
        Engine("orpheus", weights=folders("snac", codebook_size=1024), load_format=load_format)
