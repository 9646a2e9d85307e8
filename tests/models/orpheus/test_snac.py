"""The codec: equal to the reference, exact in windows, independent of the batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mstar.engine.weights import Checkpoint, load, randomize
from mstar.models import orpheus
from mstar.models.orpheus import snac
from mstar.models.orpheus.frames import to_pcm16
from mstar.models.orpheus.noise import FrameNoise, by_block
from mstar.models.orpheus.snac import SnacConfig, SnacDecoder

TINY = Path(orpheus.__file__).parent / "tiny" / "snac"
DATA = Path(__file__).parents[2] / "data" / "orpheus"
PUBLISHED = {
    **json.loads((TINY / "config.json").read_text()),
    "encoder_dim": 48,
    "decoder_dim": 1024,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_rates": [8, 8, 4, 2],
}
SMALL = {
    **PUBLISHED,
    "encoder_dim": 3,
    "encoder_rates": [2, 2],
    "decoder_dim": 16,
    "decoder_rates": [4, 2],
    "codebook_size": 32,
    "codebook_dim": 4,
}
VARIANTS = {
    "as published": {},
    "dense": {"depthwise": False},
    "no noise": {"noise": False},
    "dense, no noise": {"depthwise": False, "noise": False},
    "odd rates": {"decoder_rates": [3, 5]},
    "four levels": {"vq_strides": [8, 4, 2, 1], "latent_dim": 20},
    "coarse levels only": {"vq_strides": [4, 2]},
}


def decoder(config: SnacConfig, path: Path) -> SnacDecoder:
    with torch.device("meta"):
        net = SnacDecoder(config)
    return load(net, Checkpoint.open(path), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny() -> SnacDecoder:
    return decoder(SnacConfig.from_file(TINY / "config.json"), TINY)


@pytest.fixture(scope="module")
def goldens() -> dict[str, torch.Tensor]:
    return load_file(DATA / "goldens.safetensors")


def levels(tensors, prefix, count=3):
    found = [tensors[f"{prefix}{i}"] for i in range(count)]
    return [x if x.ndim == 2 else x[None] for x in found]


def random_codes(config: SnacConfig, batch: int, frames: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    top = config.vq_strides[0]
    shapes = [(batch, frames * (top // stride)) for stride in config.vq_strides]
    return [torch.randint(config.codebook_size, s, generator=generator) for s in shapes]


def random_noise(config: SnacConfig, batch: int, frames: int):
    if not (lengths := config.noise_lengths(1)):
        return None
    noise = FrameNoise(sum(lengths))
    return by_block(torch.stack([noise.window(item, 0, frames) for item in range(batch)]), lengths)


def cut(config: SnacConfig, codes, noise, lo: int, hi: int):
    """Frames lo to hi - 1 of codes and noise."""
    top = config.vq_strides[0]
    codes = [
        c[:, lo * (top // s) : hi * (top // s)]
        for c, s in zip(codes, config.vq_strides, strict=True)
    ]
    if noise is not None:
        lengths = config.noise_lengths(1)
        noise = [n[..., lo * k : hi * k] for n, k in zip(noise, lengths, strict=True)]
    return codes, noise


def close(wave, golden):
    return torch.allclose(wave, golden.reshape(wave.shape), rtol=0, atol=5e-6)


class TestGoldens:
    def test_waveform(self, tiny, goldens):
        wave = tiny(levels(goldens, "snac.codes"))
        assert wave.shape == (1, 8192)
        assert wave.dtype == torch.float32
        assert close(wave, goldens["snac.wav_noise_off"])

    def test_injected_noise(self, tiny, goldens):
        noise = [goldens[f"snac.noise{i}"].view(1, 1, -1) for i in range(4)]
        assert close(tiny(levels(goldens, "snac.codes"), noise), goldens["snac.wav_noise_injected"])

    def test_batch(self, tiny, goldens):
        assert close(tiny(levels(goldens, "snac.batch_codes")), goldens["snac.batch_wav"])

    @pytest.mark.parametrize("case", [0, 1, 2])
    def test_whole_utterances(self, case, tiny, goldens):
        wave = tiny(levels(goldens, f"c{case}.codes"))
        assert close(wave, goldens[f"c{case}.wav_full"])
        head = to_pcm16(wave[0, :2048].numpy()).astype(int)
        golden = goldens[f"c{case}.wav_full_i16_head"].numpy().astype(int)
        assert abs(head - golden).max() <= 1

    def test_internals(self, tiny, goldens):
        latents, stem, *blocks, _ = tiny.stages(levels(goldens, "snac.codes"), None, keep=(0, 4))
        golden = [goldens["snac.z_q"], *(goldens[f"snac.decoder_out{i}"] for i in (1, 2, 3))]
        for mine, theirs in zip((latents, stem, *blocks[:2]), golden, strict=True):
            assert torch.allclose(mine[0].T, theirs, rtol=0, atol=5e-6)
        depthwise = tiny.stem[0](latents)[0].T
        assert torch.allclose(depthwise, goldens["snac.decoder_out0"], rtol=0, atol=5e-6)

    def test_both_storage_namings_give_the_same_weights(self, tiny):
        old = decoder(tiny.config, DATA / "snac_pytorch_model.bin")
        for name, value in tiny.state_dict().items():
            assert torch.equal(old.state_dict()[name], value), name


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("naming", ["new", "old", "plain"])
def test_parity_with_the_published_implementation(variant, naming, tmp_path, monkeypatch):
    snac = pytest.importorskip("snac")
    values = {**SMALL, **variant}
    torch.manual_seed(0)
    reference = snac.SNAC(**values).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.3, 2.0)
    config = SnacConfig.from_dict(values)
    save_file(renamed(reference.state_dict(), naming), tmp_path / "model.safetensors")
    mine = decoder(config, tmp_path)
    assert not any("encoder" in name for name in mine.state_dict())

    noise = random_noise(config, 2, 5)
    blocks = iter(noise or ())
    monkeypatch.setattr(
        snac.layers.NoiseBlock, "forward", lambda self, x: x + next(blocks) * self.linear(x)
    )
    codes = random_codes(config, 2, 5)
    with torch.no_grad():
        theirs = reference.decode(codes)[:, 0]
    assert theirs.shape == (2, 5 * config.frame_samples)
    assert torch.allclose(mine(codes, noise), theirs, rtol=0, atol=5e-6)


def renamed(tensors, naming):
    """The same tensors as other torch versions name them, or with weight norm removed."""
    g, v = ".parametrizations.weight.original0", ".parametrizations.weight.original1"
    if naming == "old":
        return {n.replace(g, ".weight_g").replace(v, ".weight_v"): t for n, t in tensors.items()}
    if naming == "plain":
        plain = {n: t for n, t in tensors.items() if "parametrizations" not in n}
        for name in tensors:
            if name.endswith(v):
                pair = tensors[name], tensors[name.replace(v, g)]
                plain[name.replace(v, ".weight")] = torch._weight_norm(*pair, 0)
        return plain
    return tensors


def dummy(**changes) -> SnacDecoder:
    """Random weights large enough for every tap to matter."""
    with torch.device("meta"):
        net = SnacDecoder(SnacConfig.from_dict({**SMALL, **changes}))
    randomize(net, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(8.0)
    return net


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_context_frames_are_enough_and_one_less_is_not(variant):
    net = dummy(**variant)
    config, context = net.config, net.config.context_frames
    frames, middle = 2 * context + 1, context
    size = config.frame_samples
    here = slice(middle * size, (middle + 1) * size)
    outer = [frames - 1, 0]
    codes = random_codes(config, 1, frames + 2)
    base, _ = cut(config, codes, None, 1, frames + 1)
    wave = net(base)[:, here]
    # a signal that goes on to both sides: nothing changes
    assert torch.equal(net(codes)[:, (middle + 1) * size : (middle + 2) * size], wave)
    # the outermost frame on one side or the other: something does
    changed = []
    for frame in outer:
        other = [c.clone() for c in base]
        for level, stride in zip(other, config.vq_strides, strict=True):
            n = config.vq_strides[0] // stride
            level[:, frame * n : (frame + 1) * n] += 1
            level %= config.codebook_size
        changed.append(not torch.equal(net(other)[:, here], wave))
    assert any(changed)


@pytest.mark.parametrize("noisy", [False, True])
def test_windows_with_context_reproduce_the_whole_to_the_bit(tiny, goldens, noisy):
    codes = levels(goldens, "c0.codes")
    config, frames = tiny.config, codes[0].shape[1]
    noise = random_noise(config, 1, frames) if noisy else None
    whole = tiny(codes, noise)
    context, size = config.context_frames, config.frame_samples
    assert context == 3
    for j in range(frames):
        lo, hi = max(0, j - context), min(frames, j + 1 + context)
        window = cut(config, codes, noise, lo, hi)
        here = whole[:, j * size : (j + 1) * size]
        assert torch.equal(tiny(*window)[:, (j - lo) * size : (j - lo + 1) * size], here)
        assert torch.equal(tiny(*window, keep=(j - lo, j - lo + 1)), here)


@pytest.mark.parametrize("keep", [(0, 2), (2, 5), (4, 6), (0, 6)])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_keep_is_a_slice_of_the_whole(variant, keep):
    net = dummy(**variant)
    codes, noise = random_codes(net.config, 2, 6), random_noise(net.config, 2, 6)
    size = net.config.frame_samples
    whole = net(codes, noise)[:, keep[0] * size : keep[1] * size]
    assert torch.equal(net(codes, noise, keep=keep), whole)


def test_full_width_windows_and_batches_are_exact_to_the_bit():
    net = dummy(**PUBLISHED)
    codes, size = random_codes(net.config, 2, 9), net.config.frame_samples
    whole = net(codes)
    assert torch.equal(net([c[1:] for c in codes]), whole[1:])
    assert torch.equal(net(codes, keep=(4, 5)), whole[:, 4 * size : 5 * size])
    window = cut(net.config, codes, None, 2, 9)
    assert torch.equal(net(*window, keep=(3, 4)), whole[:, 5 * size : 6 * size])


@pytest.mark.parametrize("batch", [2, 21])
def test_an_item_does_not_depend_on_its_batch(tiny, batch):
    codes, noise = random_codes(tiny.config, batch, 7), random_noise(tiny.config, batch, 7)
    together = tiny(codes, noise)
    for i in range(0, batch, 5):
        alone = tiny([c[i : i + 1] for c in codes], [n[i : i + 1] for n in noise])
        assert torch.equal(together[i : i + 1], alone)


def test_samples_are_bounded(tiny):
    wave = tiny(random_codes(tiny.config, 1, 4))
    assert wave.abs().max() <= 1
    assert not wave.requires_grad


def test_dummy_weights_decode(tiny):
    with torch.device("meta"):
        net = SnacDecoder(tiny.config)
    randomize(net, device="cpu", dtype=torch.float32)
    assert net(random_codes(tiny.config, 1, 2)).isfinite().all()


class TestConfig:
    def test_published(self):
        config = SnacConfig.from_dict({**PUBLISHED, "_name_or_path": "ignored"})
        assert config.latent_dim == 768
        assert config.frame_samples == 2048
        assert config.context_frames == 3
        assert config.noise_lengths(4) == [128, 1024, 4096, 8192]
        assert SnacConfig.from_dict({**PUBLISHED, "noise": False}).noise_lengths(4) == []

    def test_reach_in_samples_is_what_the_reference_measured(self):
        config = SnacConfig.from_dict(PUBLISHED)
        heard = [
            s
            for s in range(-5000, 5000 + 2048)
            if (r := reach(config, s + 100 * 2048))[0] < 101 * 4 and r[1] > 100 * 4
        ]
        assert (heard[0], heard[-1]) == (-4757, 2047 + 4757)

    def test_local_attention_is_refused(self):
        with pytest.raises(ValueError, match="attn_window_size=32"):
            SnacConfig.from_dict({**PUBLISHED, "attn_window_size": 32})

    def test_uneven_strides_are_refused(self):
        with pytest.raises(ValueError, match=r"vq_strides=\[4, 3\]"):
            SnacConfig.from_dict({**PUBLISHED, "vq_strides": [4, 3]})


def reach(config: SnacConfig, sample: int) -> tuple[int, int]:
    """The latents one sample depends on, by walking the layers backwards."""
    lo = hi = sample
    lo, hi = lo - 3, hi + 3
    for rate in reversed(config.decoder_rates):
        lo, hi = lo - 39, hi + 39
        pad = (rate + 1) // 2
        inputs = [
            s
            for s in range(lo // rate - 3, hi // rate + 4)
            if rate * s - pad <= hi and lo <= rate * s - pad + 2 * rate - 1
        ]
        lo, hi = inputs[0], inputs[-1]
    return lo - 3, hi + 3 + 1


class TestMistakes:
    def test_code_shapes(self, tiny):
        codes = random_codes(tiny.config, 1, 4)
        with pytest.raises(ValueError, match=r"codes have shapes .* expected \[\(1, 4\), \(1, 8\)"):
            tiny([codes[0], codes[1][:, :-1], codes[2]])
        with pytest.raises(ValueError, match="codes have shapes"):
            tiny(codes[:2])
        with pytest.raises(ValueError, match="codes have shapes"):
            tiny([c[:, :0] for c in codes])

    def test_noise_shapes(self, tiny):
        codes, noise = random_codes(tiny.config, 1, 4), random_noise(tiny.config, 1, 3)
        with pytest.raises(ValueError, match=r"noise has shapes .* expected \[\(1, 1, 128\)"):
            tiny(codes, noise)

    def test_noise_for_a_model_without(self):
        net = dummy(noise=False)
        with pytest.raises(ValueError, match=r"noise has shapes .* expected \[\]"):
            net(random_codes(net.config, 1, 1), [torch.zeros(1, 1, 16)])

    @pytest.mark.parametrize("keep", [(-1, 2), (2, 2), (3, 5)])
    def test_keep_range(self, tiny, keep):
        with pytest.raises(ValueError, match="not a range of frames within 0 to 4"):
            tiny(random_codes(tiny.config, 1, 4), keep=keep)


def test_convolutions_with_their_activation_in_one_kernel_make_the_same_samples(tiny, monkeypatch):
    decoder, codes = tiny, [torch.randint(0, 16, (1, n)) for n in (4, 8, 16)]
    with torch.inference_mode():
        plain = decoder(codes)
        monkeypatch.setattr(snac, "use_triton", lambda x: True)
        torch.testing.assert_close(decoder(codes), plain, rtol=0, atol=2e-6)
