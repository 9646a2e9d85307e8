"""The codec as a node: batches, noise, fades, precision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mstar.engine.weights import Checkpoint, load
from mstar.models import orpheus
from mstar.models.orpheus.codec import Codec, CodecJob
from mstar.models.orpheus.snac import SnacConfig, SnacDecoder

TINY = Path(orpheus.__file__).parent / "tiny" / "snac"
FRAMES = 12
CODES = torch.randint(4096, (FRAMES * 7,), generator=torch.Generator().manual_seed(0)).tolist()
RAMP = 120  # samples: 5 ms


@pytest.fixture(scope="module")
def run():
    with torch.device("meta"):
        snac = SnacDecoder(SnacConfig.from_file(TINY / "config.json"))
    load(snac, Checkpoint.open(TINY), device="cpu", dtype=torch.float32)
    return Codec(snac, torch.device("cpu")).run


def job(low=0, high=FRAMES, keep=None, seed=None, **fades) -> CodecJob:
    return CodecJob(CODES[low * 7 : high * 7], low, high, seed, keep or (0, high - low), **fades)


@pytest.mark.parametrize("seed", [None, 5])
def test_windows_with_their_context_are_the_whole(run, seed):
    (whole,) = run([job(seed=seed)])
    assert whole.dtype == np.int16
    for frame in range(3, FRAMES - 3):
        (heard,) = run([job(frame - 3, frame + 4, (3, 4), seed)])
        assert np.array_equal(heard, whole[frame * 2048 : (frame + 1) * 2048])


def test_the_noise_of_a_window_depends_on_its_seed_and_place_alone(run):
    jobs = [job(0, 6, seed=1), job(6, 12, seed=1), job(0, 6, seed=2), job(0, 6, seed=1)]
    together = run(jobs)
    for one, pcm in zip(jobs, together, strict=True):
        assert np.array_equal(run([one])[0], pcm)
    assert np.array_equal(together[0], together[3])
    assert not np.array_equal(together[0], together[2])
    assert not np.array_equal(together[0], run([job(0, 6)])[0])


def test_fades_reach_zero_at_the_ends_and_leave_the_rest(run):
    plain, both = run([job(), job(fade_in=True, fade_out=True)])
    assert both[0] == both[-1] == 0
    assert np.array_equal(both[RAMP:-RAMP], plain[RAMP:-RAMP])
    for end in (slice(None, RAMP), slice(-RAMP, None)):
        assert np.all(np.abs(both[end].astype(int)) <= np.abs(plain[end].astype(int)))


def test_jobs_share_a_batch_only_if_they_are_cut_alike():
    assert job(0, 7, (3, 4), 1).shape == job(3, 10, (3, 4), 2).shape
    shapes = {job(0, 7, (3, 4), 1).shape, job(0, 7, (3, 4)).shape, job(0, 7, (2, 4), 1).shape}
    assert len(shapes) == 3
    assert job(3, 10, (3, 4)).cost == 7


class Convolutions(TorchDispatchMode):
    """Notes whether each convolution was allowed to use TF32."""

    def __init__(self):
        super().__init__()
        self.allowed = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._convolution.default:
            self.allowed.append(args[-1])
        assert function is not torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


def test_no_convolution_may_use_tf32_whatever_torch_is_set_to(run):
    assert torch.backends.cudnn.allow_tf32  # torch's default
    with Convolutions() as seen:
        run([job(0, 4)])
    assert seen.allowed == [False] * 13  # the stem and 3 residual units in each of 4 blocks
    assert torch.backends.cudnn.allow_tf32
