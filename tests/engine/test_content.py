"""Content of media tokens for the prefix cache."""

import numpy as np

from mstar.engine.content import media_content


def test_the_same_bytes_are_the_same_content():
    assert media_content(b"image", 5) == media_content(b"image", 5)
    assert media_content(b"image", 3) == media_content(b"image", 5)[:3]


def test_other_bytes_kinds_or_places_are_other_content():
    one = media_content(b"image", 1000)
    other = media_content(b"imagf", 1000)
    small = media_content(b"image", 1000, kind="224")
    assert len({*one, *other, *small}) == 3000


def test_media_content_cannot_be_mistaken_for_a_token_id():
    assert all(-(2**63) <= value < 0 for value in media_content(b"image", 1000))


def test_arrays_count_with_their_shape_and_type():
    flat = np.zeros(12, dtype=np.uint8)
    assert media_content(flat, 2) == media_content(flat.copy(), 2)
    assert media_content(flat, 2) != media_content(flat.reshape(3, 4), 2)
    assert media_content(flat, 2) != media_content(flat.view(np.int8), 2)
