"""Whole requests of the published implementation, on the tiny checkpoint, in float32."""

from __future__ import annotations

import pytest

INPUTS = ("image0.rgb", "audio0.waveform", "video0.rgb")
CHUNKED = ("wav_chunked_7_3", "wav_stream_4_5_ctx6")  # other samples: see test_qwen_vocoder
RESIZED = 3  # the case whose image has another size than the encoder takes


def run(index, goldens, loop, **more):
    case = goldens.cases[index]
    image, sound, video = (
        None if array is None else array.numpy()
        for array in (goldens.get(f"{index}.{name}") for name in INPUTS)
    )
    text, wave = loop.run(
        case["messages"],
        image=image,
        sound=sound,
        video=video,
        fps=case["fps"],
        together=case["use_audio_in_video"],
        **more,
    )
    assert text == case["response"]
    assert len(wave) == case["samples"]


@pytest.mark.parametrize("index", range(6))
def test_every_step_is_that_of_the_reference(index, goldens, loop):
    run(index, goldens, loop, pixels=goldens.get(f"{index}.image.pixel_values"))
    names = [name for name in goldens if name.startswith(f"{index}.")]
    checked = [name for name in names if not name.endswith((*INPUTS, *CHUNKED))]
    for name in checked:
        goldens.check(name, loop.seen[name.removeprefix(f"{index}.")])
    assert len(checked) >= 27


def test_an_image_that_pillow_resizes_leads_to_the_same_words_and_codes(goldens, loop):
    run(RESIZED, goldens, loop)
    off = (loop.seen["image.pixel_values"] - goldens[f"{RESIZED}.image.pixel_values"]).abs()
    assert off.max() <= 2.01 / 127.5
    assert (off > 1e-5).float().mean() < 0.01
    for name in ("image.grid_thw", "input_ids", "thinker_generated", "codes"):
        goldens.check(f"{RESIZED}.{name}", loop.seen[name])


def test_images_that_need_no_resizing_are_exact(goldens, loop):
    run(1, goldens, loop)
    goldens.check("1.image.pixel_values", loop.seen["image.pixel_values"])
