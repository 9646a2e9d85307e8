"""Features are kept up to a number of bytes, the most recently used ones."""

from __future__ import annotations

import torch

from mstar.engine.feature_cache import FeatureCache


def test_the_least_recently_used_features_leave_first():
    cache = FeatureCache(100)
    ones = [torch.full((10,), float(i)) for i in range(4)]
    cache.put("a", ones[0])
    cache.put("b", ones[1])
    assert cache.get("a")[0] is ones[0]
    cache.put("c", ones[2])
    assert cache.get("b") is None
    assert cache.get("a")[0] is ones[0]
    assert (len(cache), cache.bytes, cache.hits) == (2, 80, 2)


def test_what_is_larger_than_the_cache_is_not_kept_and_nothing_leaves_for_it():
    cache = FeatureCache(100)
    cache.put("small", torch.zeros(10))
    cache.put("large", torch.zeros(20), torch.zeros(20))
    assert cache.get("large") is None
    assert cache.get("small") is not None


def test_a_view_counts_with_all_that_it_keeps_alive():
    cache = FeatureCache(100)
    cache.put("view", torch.zeros(1000)[:2])
    assert len(cache) == 0
