"""The vocoder: every stage, and sound made as codes come."""

from __future__ import annotations

import copy

import pytest
import torch

STAGES = {
    "upsample0.1": 0,
    "upsample1.1": 1,
    "decoder0": 2,
    "decoder1": 3,
    "decoder2": 4,
}


def test_every_stage_is_that_of_the_reference(goldens, loop):
    vocoder, codes = loop.vocoder, goldens["c2w.codes"]
    rows = vocoder.embed(codes)
    goldens.check("c2w.embed_mean", rows)
    rows = vocoder.transform(rows)
    goldens.check("c2w.pre_transformer", rows)
    stages = vocoder.synthesis.stages(rows)
    for name, index in STAGES.items():
        goldens.check(f"c2w.{name}", stages[index])
    for index, before in enumerate((rows.transpose(1, 2), stages[0])):
        goldens.check(f"c2w.upsample{index}.0", vocoder.synthesis.upsample[index][0](before)[0])
    goldens.check("c2w.wav", stages[-1][:, None])


@pytest.mark.gpu
def test_samples_of_a_gpu_are_those_of_a_cpu(loop):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 14, loop.vocoder.config.hidden_size, generator=draw)
    expected = loop.vocoder.synthesis(rows, 10)
    found = copy.deepcopy(loop.vocoder.synthesis).cuda()(rows.cuda(), 10)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_frame_is_80_ms(loop):
    assert loop.vocoder.config.frame_samples == 1920
    assert (loop.vocoder.synthesis.tail, loop.vocoder.synthesis.context) == (555, 10)


def chunked(vocoder, codes, ends, context, tail=0):
    """Decoding by windows, which is not exact."""
    start, found = 0, []
    for end in ends:
        before = min(context, start)
        wave = vocoder(codes[None, :, start - before : end])[0]
        found.append(wave[before * 1920 - (tail if start else 0) :])
        start = end
    return torch.cat(found)


def test_windows_of_the_reference(goldens, loop):
    codes = goldens["1.codes"]
    frames = codes.shape[1]
    ends = [*range(7, frames, 7), frames]
    goldens.check("1.wav_chunked_7_3", chunked(loop.vocoder, codes, ends, 3))
    rows = goldens.cases[1]["stream_4_5_ctx6"]["rows"]
    found = chunked(loop.vocoder, codes, [row[1] for row in rows], 6, loop.vocoder.synthesis.tail)
    goldens.check("1.wav_stream_4_5_ctx6", found)


@pytest.mark.parametrize("chunks", [[1] * 33, [4, 5, 24], [2, 7, 1, 1, 13, 9], [33]])
def test_streamed_sound_is_that_of_all_codes_at_once(chunks, goldens, loop):
    codes = goldens["2.codes"][None]
    whole = loop.vocoder(codes)
    stream, found = loop.vocoder.stream(), []
    for part in codes.split(chunks, -1):
        found.append(loop.vocoder.extend(part, [stream]))
        assert sum(wave.shape[1] for wave in found) == stream.frames * 1920 - 555
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=2e-6, rtol=0)


def test_streams_of_several_lengths_go_together(goldens, loop):
    """Twelve frames into one clip and twenty into another, both are ten rows of context in."""
    vocoder = loop.vocoder
    clips = [goldens["2.codes"], goldens["3.codes"]]
    streams = [vocoder.stream(), vocoder.stream()]
    for clip, stream, frames in zip(clips, streams, (12, 20), strict=True):
        vocoder.extend(clip[None, :, :frames], [stream])
    found = vocoder.extend(torch.stack([clips[0][:, 12:17], clips[1][:, 20:25]]), streams)
    for clip, wave, start in zip(clips, found, (12, 20), strict=True):
        begin = start * 1920 - 555
        whole = vocoder(clip[None])[0, begin : begin + 5 * 1920]
        torch.testing.assert_close(wave, whole, atol=2e-6, rtol=0)
