"""The networks one by one: what batching, packing and the order of tokens may not change."""

from __future__ import annotations

import pytest
import torch

from mstar.engine.kvcache import KVPool
from mstar.engine.layers.attention import GrowingContext
from mstar.engine.lm import LanguageModel, Span
from mstar.engine.runtime import Runtime
from mstar.models.bagel.positions import PositionTable, grid_rows


def near(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- embedders -----------------------------------------------------------------------------------


def test_time_embeddings_are_those_of_the_reference(loop, goldens):
    t = torch.tensor([0.0, 1.0, 0.9545455, 0.3])
    goldens.check("time_embed", loop.bagel.latents.time_embedder(t))


def test_latent_tokens_of_a_batch_are_those_of_each_image(loop):
    latents, t = torch.randn(3, 12, 64), torch.tensor([0.0, 0.5, 1.0])
    together = loop.bagel.latent_tokens(latents, t, 3, 4)
    for index in range(3):
        near(together[index], loop.bagel.latent_tokens(latents[index], t[index].item(), 3, 4))


def test_places_are_counted_in_the_table_and_not_in_the_image():
    table = torch.arange(25.0).view(25, 1)
    assert grid_rows(table, (2, 3)).flatten().tolist() == [0, 1, 2, 5, 6, 7]


def test_images_beyond_the_table_are_refused(loop):
    table = PositionTable(4, 8)
    for grid in ((5, 1), (1, 5), (0, 4)):
        with pytest.raises(ValueError, match="a side has 1 to 4"):
            table(grid)
    with pytest.raises(ValueError, match="10 latent tokens for a grid 3 x 4"):
        loop.bagel.latent_tokens(torch.randn(10, 64), 0.0, 3, 4)


# -- the vision encoder --------------------------------------------------------------------------


@pytest.mark.parametrize("grids", [[(3, 4), (5, 2), (3, 4)], [(4, 4), (2, 8)], [(12, 12)]])
def test_images_in_one_batch_do_not_see_each_other(loop, grids):
    images = [torch.rand(h * w, 192) for h, w in grids]
    together = loop.bagel.image_tokens(torch.cat(images), grids)
    parts = together.split([len(image) for image in images])
    for image, grid, found in zip(images, grids, parts, strict=True):
        near(found, loop.bagel.image_tokens(image, [grid]))


def test_patches_and_grids_must_agree(loop):
    with pytest.raises(ValueError, match="13 patches, and the grids"):
        loop.bagel.image_tokens(torch.rand(13, 192), [(3, 4)])


# -- the autoencoder -----------------------------------------------------------------------------


def test_a_batch_is_encoded_and_decoded_as_each_image(loop):
    pixels = torch.rand(3, 3, 48, 32) * 2 - 1
    mean, logvar = loop.autoencoder.encode(pixels)
    assert mean.shape == logvar.shape == (3, 16, 6, 4)
    decoded = loop.autoencoder.decode(mean)
    for index in range(3):
        rows = slice(index, index + 1)
        near(
            torch.cat([mean, logvar], 1)[rows], torch.cat(loop.autoencoder.encode(pixels[rows]), 1)
        )
        near(decoded[rows], loop.autoencoder.decode(mean[rows]))


# -- the decoder ---------------------------------------------------------------------------------


def test_embeddings_and_ids_are_the_same_input(loop):
    ids = torch.randint(400, (20,))
    hidden = loop.decoder(ids)
    near(hidden, loop.decoder(loop.decoder.embed(ids)))
    chunks = GrowingContext()
    parts = [loop.decoder(ids[:7], torch.arange(7), chunks)]
    parts.append(loop.decoder(ids[7:], torch.arange(7, 20), chunks))
    near(torch.cat(parts), hidden)


@pytest.mark.parametrize("lead", [0, 5, 9])
def test_tokens_of_a_span_of_one_position_may_stand_in_any_order(loop, lead):
    x, order = (
        torch.randn(9, 64),
        torch.cat([torch.randperm(lead), lead + torch.randperm(9 - lead)]),
    )
    spans = []
    for inputs in (x, x[order]):
        context = GrowingContext()
        context.causal = False
        spans.append(loop.decoder(inputs, torch.full((9,), 3), context, lead))
    near(spans[1], spans[0][order])


def test_experts_are_not_each_other(loop):
    x = torch.randn(4, 64)
    both = loop.decoder(x), loop.decoder.norm_lead(loop.decoder(x, lead=4))
    assert (both[0] - both[1]).abs().max() > 0.1


def test_what_is_kept_begins_with_the_input_and_ends_with_the_last_layer(loop):
    x, layers = torch.randn(6, 64), []
    hidden = loop.decoder(x, lead=4, keep=layers)
    assert len(layers) == 1 + loop.decoder.config.num_hidden_layers
    assert torch.equal(layers[0], x)
    assert torch.equal(layers[-1][:4], hidden[:4])


def test_on_pages_it_gives_what_it_gives_without_the_engine(loop):
    prompt, image = torch.randint(400, (11,)), torch.randn(14, 64)
    plain = GrowingContext()
    loop.decoder(prompt, torch.arange(11), plain)
    plain.causal = False
    loop.decoder(image, torch.full((14,), 11), plain, 12)
    expected = loop.decoder(torch.tensor([5]), torch.tensor([12]), plain)
    lm = LanguageModel("lm", loop.decoder, KVPool(loop.decoder.kv_layout, 128, page_size=4))
    found = []

    async def walk():
        with lm.open_cache() as kv:
            await lm.feed(kv, prompt.tolist())
            await lm(Span(kv, image, 14, positions=[11] * 14, causal=False, lead=12))
            found.append((await lm(Span(kv, [5], 1, positions=[12], hidden=True))).hidden)
        runtime.stop()

    runtime = Runtime()
    lm.bind(runtime.schedule)
    runtime.spawn(walk())
    runtime.run()
    near(found[0], expected)
