"""Figures of one request, against numbers worked out by hand."""

import pytest

from mstar.bench.audio import PcmMeter, is_pcm
from mstar.bench.measure import Figures, Underruns, figures, meets, percentile, underruns
from mstar.bench.report import spread
from mstar.bench.trace import Bad, Trace
from mstar.types import AudioBuffer

approx = pytest.approx


def test_text():
    trace = Trace(0, sent=10.0, end=12.5, text=[10.5, 10.6, 10.9, 11.5])
    found = figures(trace)
    assert (found.ttft, found.e2e) == (approx(0.5), approx(2.5))
    assert found.itl == (approx(0.1), approx(0.3), approx(0.6))
    assert found.tpot == approx(1 / 3)
    assert (found.tokens, found.counted) == (4, False)
    assert (found.first_audio, found.rtf, found.underruns) == (None, None, None)


def test_the_servers_count_of_tokens_goes_before_the_number_of_pieces():
    trace = Trace(0, sent=0.0, end=2.0, text=[1.0, 2.0], tokens=11, text_tokens=11)
    found = figures(trace)
    assert (found.tokens, found.counted, found.tpot) == (11, True, approx(0.1))
    speaks = figures(Trace(0, sent=0.0, end=2.0, text=[1.0, 2.0], tokens=11, text_tokens=3))
    assert (speaks.tokens, speaks.tpot) == (11, approx(0.5))


def test_one_piece_of_text_has_no_gap():
    found = figures(Trace(0, sent=0.0, end=1.0, text=[1.0], text_tokens=9))
    assert (found.ttft, found.itl, found.tpot) == (1.0, (), None)


def test_sound():
    trace = Trace(0, sent=5.0, end=8.0, audio=[(5.5, 1.0), (6.0, 0.5), (7.25, 1.0)])
    found = figures(trace)
    assert found.first_audio == approx(0.5)
    assert found.audio_seconds == approx(2.5)
    assert found.rtf == approx(2.25 / 2.5)
    assert (found.underruns, found.underrun_seconds) == (1, approx(0.25))


def test_compressed_sound_has_no_length():
    found = figures(Trace(0, sent=0.0, end=1.0, audio=[(0.5, 0.0)], audio_is_timed=False))
    assert (found.first_audio, found.rtf, found.underruns) == (0.5, None, None)


@pytest.mark.parametrize(
    ("audio", "count", "seconds"),
    [
        ([], 0, 0.0),
        ([(9.0, 0.1)], 0, 0.0),  # the wait for the first is no underrun
        ([(0.0, 1.0), (1.0, 1.0)], 0, 0.0),  # just in time
        ([(0.0, 1.0), (1.0009, 1.0)], 0, 0.0),  # what a player's buffer hides
        ([(0.0, 1.0), (1.5, 1.0)], 1, 0.5),
        ([(0.0, 1.0), (1.5, 1.0), (2.5, 1.0)], 1, 0.5),  # playing goes on later after a stop
        ([(0.0, 1.0), (1.5, 1.0), (3.0, 1.0)], 2, 1.0),
        ([(0.0, 3.0), (0.1, 1.0), (3.9, 1.0)], 0, 0.0),  # what came early is in store
        ([(0.0, 0.0), (2.0, 1.0), (2.9, 1.0)], 0, 0.0),  # an empty piece does not begin to play
        ([(0.0, 1.0), (5.0, 0.0)], 0, 0.0),  # nor does one at the end come late
    ],
)
def test_underruns(audio, count, seconds):
    assert underruns(audio) == Underruns(count, approx(seconds))


@pytest.mark.parametrize(
    ("values", "q", "value"),
    [
        ([3.0], 50, 3.0),
        ([3.0], 99, 3.0),
        ([1.0, 2.0], 50, 1.5),
        ([1.0, 2.0, 3.0], 50, 2.0),
        ([0.0, 10.0], 90, 9.0),
        ([float(i) for i in range(101)], 99, 99.0),
        ([1.0, 2.0], 100, 2.0),
        ([1.0, 2.0], 0, 1.0),
    ],
)
def test_percentiles(values, q, value):
    assert percentile(values, q) == approx(value)


def test_a_spread():
    assert spread([]) is None
    found = spread([2.0, 1.0, 3.0])
    assert found == {"count": 3, "mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98, "max": 3.0}


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ({}, True),
        ({"ttft": 0.5}, True),
        ({"ttft": 0.49}, False),
        ({"ttft": 0.5, "e2e": 1.9}, False),
        ({"itl": 0.5}, True),
        ({"itl": 0.3}, False),
        ({"rtf": 1.0}, False),  # it made no sound
        ({"underruns": 0}, False),
    ],
)
def test_goodput_of_a_request(slo, good):
    request = Figures(e2e=2.0, ttft=0.5, itl=(0.1, 0.4))
    assert meets(request, slo) is good


def test_a_single_piece_keeps_a_limit_of_gaps():
    assert meets(Figures(e2e=1.0, ttft=0.5), {"itl": 0.01})
    assert not meets(Figures(e2e=1.0), {"itl": 0.01})


# sound in bytes


def test_pcm_is_24_khz_unless_the_server_says_otherwise():
    assert PcmMeter().feed(bytes(48000)) == approx(1.0)
    assert PcmMeter("audio/L16;rate=16000;channels=2").feed(bytes(64000)) == approx(1.0)
    with pytest.raises(Bad, match="0 Hz"):
        PcmMeter("audio/L16;rate=0")


def test_a_wav_header_is_no_sound_wherever_it_is_cut():
    import numpy as np

    wav = AudioBuffer(np.ones(16000, np.int16), 16000).to_wav()
    meter = PcmMeter()
    assert sum(meter.feed(wav[i : i + 1]) for i in range(200)) == approx(156 / 32000)
    assert meter.feed(wav[200:]) == approx(1 - 156 / 32000)
    assert meter.feed(wav) == approx(1.0)  # some servers send a WAV file per piece


def test_compressed_formats_are_told_apart():
    assert is_pcm("audio/pcm", b"\0\0")
    assert is_pcm("application/octet-stream", b"RIFF")
    assert not is_pcm("audio/mpeg", b"")
    assert not is_pcm("application/octet-stream", b"fLaC")
