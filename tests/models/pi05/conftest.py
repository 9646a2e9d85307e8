from __future__ import annotations

import pytest
import torch
from pi05_data import TINY, Goldens

from mstar.models.pi05.networks import Policy, load_policy, policy_config
from mstar.models.pi05.plain import PlainPolicy
from mstar.models.pi05.processing import Processor


@pytest.fixture(scope="session")
def goldens() -> Goldens:
    return Goldens()


@pytest.fixture(scope="session")
def whole() -> Policy:
    with torch.inference_mode():
        return load_policy(TINY, device="cpu", dtype=torch.float32, whole=True)


@pytest.fixture(scope="session")
def policy() -> Policy:
    with torch.inference_mode():
        return load_policy(TINY, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def plain(whole) -> PlainPolicy:
    return PlainPolicy(whole)


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.from_folder(TINY, policy_config(TINY))


@pytest.fixture(autouse=True)
def inference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are so small that a second one only gets in the way
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
