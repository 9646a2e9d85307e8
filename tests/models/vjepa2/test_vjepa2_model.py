"""V-JEPA 2 in the Engine: every flow against stored outputs, batched, over HTTP; bad requests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from mstar import Engine, cli
from mstar.client import MStarClient
from mstar.engine.captured import CapturedSteps
from mstar.errors import InvalidRequest
from mstar.models.base import Setup
from mstar.models.registry import get
from mstar.models.vjepa2.config import PUBLISHED
from mstar.models.vjepa2.model import VJepa2
from mstar.models.vjepa2.networks import find_config
from mstar.models.vjepa2.preprocess import cropped, normalise, pixel_rule
from mstar.models.vjepa2.requests import Asked, Seen
from tests.recording import replays

GOLDENS = load_file(Path(__file__).parents[2] / "data/vjepa2/goldens.safetensors")
TINY = get("vjepa2").tiny / "vjepa2"
SINGLE, ROLLOUT = 2e-5, 1e-4


def golden(name, case="tiny_vjepa2"):
    return GOLDENS[f"{case}/{name}"].numpy()


FRAMES = golden("frames_u8")
CLIP = {"video": FRAMES, "num_frames": 8}


def of_size(frames):
    """Frames as preprocessing leaves them: nothing is resized or cropped."""
    return {"video": np.pad(frames, ((0, 0), (2, 2), (2, 2), (0, 0)))}


@pytest.fixture(scope="module")
def engine():
    with Engine("vjepa2-tiny") as engine:
        yield engine


def one(result):
    assert len(result.latents) == 1
    return result.latents[0]


def masks(row=0):
    names = ("context_mask", "target_mask")
    return {name: golden(name)[row].tolist() for name in names}


# -- preprocessing -------------------------------------------------------------------------------


def test_pixels_are_those_of_the_published_processor():
    rule = pixel_rule(32, TINY / "video_preprocessor_config.json")
    images = [Image.fromarray(FRAMES[index]) for index in golden("frame_indices")]
    pixels = normalise(cropped(images, rule), rule.mean, rule.std)
    assert abs(pixels.numpy() - golden("pixel_values")[0]).max() < 1e-6
    assert (pixel_rule(256).shortest, pixel_rule(384).shortest) == (292, 438)


def test_frames_that_have_the_size_are_only_cropped():
    frames = np.random.default_rng(0).integers(0, 255, (2, 36, 41, 3), np.uint8)
    found = cropped(map(Image.fromarray, frames), pixel_rule(32))
    assert torch.equal(found, torch.from_numpy(frames[:, 2:34, 4:36]).permute(0, 3, 1, 2))


# -- flows ---------------------------------------------------------------------------------------


def test_the_encoder_alone(engine):
    result = engine.generate(**CLIP, skip_predictor=True)
    assert abs(one(result) - golden("encoder_out")).max() < SINGLE
    assert one(result).dtype == np.float32
    assert result.raw[0].metadata == {"dtype": "float32", "shape": [1, 64, 64]}
    assert result.finish_reason == "stop"


def test_predictions_of_everything_and_of_masks(engine):
    assert abs(one(engine.generate(**CLIP)) - golden("predictor_full")).max() < SINGLE
    found = one(engine.generate(**CLIP, **masks()))
    array = {name: np.array([ids]) for name, ids in masks().items()}
    assert np.array_equal(found, one(engine.generate(**CLIP, **array)))
    tokens = engine.encode(FRAMES, num_frames=8)
    assert np.array_equal(found[0], engine.predict(tokens, **masks()).numpy())
    assert np.array_equal(found[0], engine.predict(tokens.numpy()[None], **masks()).numpy())


def test_context_alone(engine):
    found = one(engine.generate(**CLIP, **masks(), context_only=True))
    net, ids = engine.model.net, {n: torch.tensor([m]) for n, m in masks().items()}
    with torch.inference_mode():
        seen = net.encoder(GOLDENS["tiny_vjepa2/pixel_values"], ids["context_mask"])
        expected = net.predictor(seen, ids["context_mask"], ids["target_mask"], 4, 4)
    assert abs(found - expected.numpy()).max() < SINGLE


@pytest.mark.parametrize("stream_rollout", [False, True])
def test_rollouts(engine, stream_rollout):
    events = list(engine.stream(**CLIP, rollout_horizon=3, stream_rollout=stream_rollout))
    steps = [event.latents for event in events[:-1]]
    assert abs(np.stack(steps, 1) - golden("anticipation_rollout")).max() < ROLLOUT
    further = engine.generate(**CLIP, rollout_horizon=2, num_output_frames=4, steps_ahead=0)
    assert [step.shape for step in further.latents] == [(1, 32, 64)] * 2


def test_labels(engine):
    expected = torch.from_numpy(golden("logits", "tiny_vjepa2_cls"))
    net = engine.model.net
    with torch.inference_mode():
        logits = net.classifier(net.encoder(GOLDENS["tiny_vjepa2/pixel_values"]))[0]
    result = engine.generate(**CLIP, classify=True)
    order = logits.argsort(descending=True)
    assert result.labels == [f"LABEL_{index}" for index in order[:5]]
    np.testing.assert_allclose(result.scores, logits.softmax(-1)[order[:5]], atol=1e-6)
    assert result.text == result.labels[0]
    assert not result.latents
    both = engine.generate(**CLIP, output_modalities=("text", "latent"), top_k=7)
    assert len(both.labels) == expected.shape[1]
    assert sum(both.scores) == pytest.approx(1)
    assert np.array_equal(one(both), one(engine.generate(**CLIP)))


def test_an_image_is_a_clip_of_one_frame(engine):
    still = Image.fromarray(FRAMES[0])
    found = one(engine.generate(images=still, skip_predictor=True))
    assert found.shape == (1, 16, 64)
    twice = engine.generate(video=[still, still], skip_predictor=True)
    assert abs(found - one(twice)).max() < SINGLE
    for frames in (still, FRAMES[0], FRAMES[:1], [still]):
        assert np.array_equal(engine.encode(frames).numpy(), found[0])


def test_images_are_the_frames_of_a_clip(engine):
    out = io.BytesIO()
    first, *rest = map(Image.fromarray, FRAMES[:6])
    first.save(out, "PNG", save_all=True, append_images=rest)
    asked = {"skip_predictor": True}
    expected = one(engine.generate(video=FRAMES[:6], **asked))
    for given in (
        {"images": list(FRAMES[:6])},
        {"images": out.getvalue()},
        {"video": [*FRAMES[:6]]},
    ):
        assert np.array_equal(one(engine.generate(**given, **asked)), expected)


def test_files_give_as_many_frames_as_training_had(engine):
    out = io.BytesIO()
    first, *rest = map(Image.fromarray, FRAMES)
    first.save(out, "PNG", save_all=True, append_images=rest)
    found = one(engine.generate(video=("clip.png", out.getvalue()), skip_predictor=True))
    assert abs(found - golden("encoder_out")).max() < SINGLE
    assert one(engine.generate(video=FRAMES, skip_predictor=True)).shape == (1, 96, 64)


def test_frames_are_taken_by_time(engine):
    """13 frames at 10 a second, of which 6 a second are int(7.8), from 0 on."""
    av, out = pytest.importorskip("av"), io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        stream = file.add_stream("ffv1", rate=10)  # lossless
        stream.height, stream.width, stream.pix_fmt = *FRAMES.shape[1:3], "bgr0"
        for frame in FRAMES:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    film = ("clip.mkv", out.getvalue())
    expected = engine.encode(FRAMES[[k * 13 // 7 for k in range(7)]]).numpy()
    assert np.array_equal(engine.encode(film, fps=6).numpy(), expected)
    assert np.array_equal(one(engine.generate(video=film, fps=6, skip_predictor=True))[0], expected)


def test_requests_share_batches_and_stay_what_they_are(engine):
    clips = [np.roll(FRAMES, shift, axis=2) for shift in range(3)]
    asked = [{"video": clip, "num_frames": 8} for clip in clips]
    asked += [{**asked[0], **masks(0)}, {**asked[1], **masks(1)}]
    alone = [one(engine.generate(**each)) for each in asked]
    before = dict(engine.stats()["nodes"]["encode"]["batch_sizes"])
    together = engine.generate_batch(asked)
    sizes = engine.stats()["nodes"]["encode"]["batch_sizes"]
    assert any(int(size) > 1 and sizes[size] > before.get(size, 0) for size in sizes)
    for mine, theirs in zip(alone, together, strict=True):
        assert abs(mine - one(theirs)).max() < SINGLE


def test_a_captured_step_gives_the_same():
    """With what stands for CUDA graphs on a CPU."""
    setup = Setup({"vjepa2": TINY}, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        plain, model = VJepa2.load(setup), VJepa2.load(setup)
        model._steps = CapturedSteps(replays, torch.device("cpu"))
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            frames = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
            batch, ids = [Seen(frames), Seen(frames.flip(0))], torch.arange(64)
            found, expected = model._encode(batch), plain._encode(batch)
            assert all(map(torch.equal, found, expected))
            asked = [Asked(tokens, ids, ids) for tokens in found]
            assert all(map(torch.equal, model._predict(asked), plain._predict(asked)))


def test_random_weights_need_a_config_alone(tmp_path):
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    with Engine(tmp_path, load_format="dummy") as engine:
        assert one(engine.generate(**CLIP)).shape == (1, 64, 64)
    full = get("vjepa2").full / "vjepa2"
    assert find_config(full) == PUBLISHED["vitl"]
    assert find_config(full, "vitg-384") == PUBLISHED["vitg-384"]


# -- the alias, and HTTP -------------------------------------------------------------------------


def test_latents_may_be_asked_for_as_video(engine):
    found = engine.generate(**CLIP, output_modalities=("video", "latent"))
    assert np.array_equal(one(found), one(engine.generate(**CLIP)))


def test_over_http(engine):
    pytest.importorskip("fastapi")
    from mstar.http import create_app
    from tests.http.conftest import serving

    out = io.BytesIO()
    first, *rest = map(Image.fromarray, FRAMES)
    first.save(out, "GIF", save_all=True, append_images=rest)
    clip = {"images": ("clip.gif", out.getvalue())}
    with serving(engine, create_app(engine)) as site:
        client = MStarClient(site.url)
        for asked in (clip, {**clip, **masks()}, {**clip, "rollout_horizon": 2}):
            here = engine.generate(**asked)
            for streamed in (False, True):
                there = client.generate(**asked, output_modalities=("video",), stream=streamed)
                latents = [e.latents for e in list(there)[:-1]] if streamed else there.latents
                assert len(latents) == len(here.latents)
                assert all(map(np.array_equal, latents, here.latents))
        labelled = client.generate(**clip, classify=True)
        assert labelled.labels == engine.generate(**clip, classify=True).labels
        sent = {"files": ("clip.gif", out.getvalue())}
        form = {"output_modalities": "video", "streaming": "false"}
        reply = site.post(files=sent, data=form).json()["outputs"]["video"][0]
        assert reply["metadata"]["dtype"] == "float32"
        assert reply["metadata"]["shape"] == [1, 64, 64]


def test_in_the_shell(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index in range(4):
        Image.fromarray(FRAMES[index]).save(f"{index}.png")
    attached = [word for index in range(4) for word in ("-a", f"{index}.png")]

    def mstar(*args):
        done = CliRunner().invoke(cli.app, ["generate", "vjepa2-tiny", *attached, *args])
        assert done.exit_code == 0, done.output
        return done

    mstar("-o", "latents.npz", "-s", "context_mask=[0, 1]", "-s", "target_mask=[30, 31]")
    masks = {"context_mask": range(2), "target_mask": range(30, 32)}
    expected = one(engine.generate(video=FRAMES[:4], **masks))
    assert np.array_equal(np.load("latents.npz")["latents_0"], expected)
    told = json.loads(mstar("-m", "text", "--json", "-s", "top_k=2").stdout)
    assert [len(told["labels"]), len(told["scores"])] == [2, 2]
    assert mstar("-m", "text").stdout == f"{told['labels'][0]}\n"


# -- bad requests --------------------------------------------------------------------------------

BAD = {
    "a clip shorter than a tubelet": ({"video": FRAMES[:1]}, "1 of the 2 frames of a tubelet"),
    "too few frames taken": ({"video": FRAMES, "num_frames": 1}, "1 of the 2 frames"),
    "a broken file": ({"video": b"no video at all"}, "is no video"),
    "an empty file": ({"video": ("clip.mp4", b"")}, "is no video"),
    "no frames": ({"video": FRAMES[:0]}, "it has no frames"),
    "nothing": ({}, "nothing was given"),
    "floats": ({"video": FRAMES.astype(np.float32)}, "must be uint8"),
    "two clips": ({"video": [FRAMES, FRAMES]}, "one clip a request"),
    "images and a video": ({"video": FRAMES, "images": FRAMES[0]}, "give images or a video"),
    "more frames than there are": ({"video": FRAMES, "num_frames": 14}, "there are 13 frames"),
    "a rate of an array": ({"video": FRAMES, "fps": 4}, "only files of videos say"),
    "one mask": ({**CLIP, "context_mask": [0]}, "go together"),
    "an empty mask": ({**CLIP, "context_mask": [], "target_mask": [1]}, "one list of numbers"),
    "two masks": ({**CLIP, "context_mask": [[0], [1]], "target_mask": [1]}, "one list of numbers"),
    "a negative token": ({**CLIP, "context_mask": [-1], "target_mask": [1]}, "numbered from 0"),
    "half a token": ({**CLIP, "context_mask": [0.5], "target_mask": [1]}, "one list of numbers"),
    "context beyond the clip": (
        {**CLIP, "context_mask": [64], "target_mask": [1]},
        "context_mask=.*64 is out of range; the clip has the tokens 0 to 63",
    ),
    "targets beyond the future": (
        {**CLIP, "context_mask": [0], "target_mask": [128]},
        "its future ends with 127",
    ),
    "a long horizon": ({**CLIP, "rollout_horizon": 17}, "must be at most 16"),
    "no horizon": ({**CLIP, "rollout_horizon": -1}, "rollout_horizon=-1"),
    "a rollout of a tubelet": ({"video": FRAMES[:2], "rollout_horizon": 2}, "at least 4 frames"),
    "a step as long as the clip": (
        {**CLIP, "rollout_horizon": 2, "num_output_frames": 8},
        "less than the clip has, 6",
    ),
    "masks and a rollout": ({**CLIP, **masks(), "rollout_horizon": 2}, "does not go with"),
    "an unknown parameter": ({**CLIP, "horizon": 2}, "unknown parameter"),
    "another output": ({**CLIP, "output_modalities": ("audio",)}, "latent, text only"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_say_what_is_wrong(engine, what):
    request, said = BAD[what]
    with pytest.raises(InvalidRequest, match=said):
        engine.generate(**request)
    assert engine.stats()["requests"]["running"] == 0


def test_latents_that_do_not_fit(engine):
    for wrong, said in [
        (np.zeros((64, 63)), "must be .tokens, 64."),
        (np.zeros((63, 64)), "16 tokens for each time"),
        (np.full((64, 64), np.nan), "must be finite"),
        (torch.zeros(64, 64).to_sparse(), "must be finite"),
    ]:
        with pytest.raises(InvalidRequest, match=said):
            engine.predict(wrong)


def test_a_checkpoint_without_a_classifier_cannot_classify(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    config["architectures"] = ["VJEPA2Model"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
    with Engine(tmp_path) as engine:
        for asked in ({"classify": True}, {"output_modalities": ("text",)}):
            with pytest.raises(InvalidRequest, match="has no classifier"):
                engine.generate(**CLIP, **asked)


@pytest.mark.parametrize(
    "options", [{"size": "vitx"}, {"pooler_heads": 5}, {"pooler_heads": 0}, {"max_rollout": "a"}]
)
def test_options_that_make_no_sense(options):
    with pytest.raises(InvalidRequest, match=f"options.{next(iter(options))}"):
        Engine("vjepa2-tiny", options=options)


def test_other_heads_of_the_pooler_change_the_labels_alone(engine):
    with Engine("vjepa2-tiny", options={"pooler_heads": 2}) as other:
        asked = {**CLIP, "output_modalities": ("latent", "text")}
        mine, theirs = engine.generate(**asked), other.generate(**asked)
    assert np.array_equal(one(mine), one(theirs))
    assert mine.scores != theirs.scores
