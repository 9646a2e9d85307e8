"""Calls as one captured step, with a recorder that runs the step instead of a GPU."""

from __future__ import annotations

from threading import Thread

import numpy as np
import pytest
import torch
from pi05_data import asked, check_alone_and_together, every_case

from mstar import Engine, InvalidRequest
from mstar.engine.node import Node
from mstar.models.pi05.whole import WholeCall
from tests.recording import Strict, strict_replays

CPU = torch.device("cpu")


def capturing(engine, rows, recorded):
    """Let an engine's model capture its calls."""

    def record(step):
        recorded.append(step)
        return strict_replays(step)

    model = engine.model
    whole = WholeCall(model.policy, model.processor, model._table, CPU, rows, record)
    act = Node("act", whole.run, key=whole.bucket, max_batch=rows)
    model.whole, model.act = whole, act


@pytest.fixture(scope="module", params=[1, 3])
def engine(request):
    """One that captures, with what it recorded as `engine.recorded`."""
    with Engine("pi05-tiny") as engine:
        engine.recorded = []
        capturing(engine, request.param, engine.recorded)
        yield engine


@pytest.mark.parametrize(("kind", "least"), [("int8", 1e-4), ("fp8", 0.03)])
def test_weights_of_8_bits_are_captured_too(kind, least, goldens):
    """Padding moves the last bits of sums, and rounding to e4m3 makes more of them."""
    request = asked(goldens, 0, noise=0)
    with Engine("pi05-tiny", quantization=kind) as engine:
        expected = engine.act(**request)
        capturing(engine, 1, recorded := [])
        found = engine.act(**request)
    assert recorded
    assert np.linalg.norm(found - expected) < least * np.linalg.norm(expected)


def test_every_golden_alone_and_all_of_them_at_once(engine, goldens):
    made = check_alone_and_together(engine, goldens, "act")
    assert made["calls"] == len(every_case(goldens))
    assert (made["batches"] < made["calls"]) == (engine.model.whole.rows > 1)


def test_robot_units_are_those_of_the_host_to_the_bit(engine, goldens, monkeypatch):
    request, processor = asked(goldens, 0), engine.model.processor
    raw, found = (engine.act(**request, raw=raw) for raw in (True, False))
    state = np.array(request["robot_state"], np.float32)
    assert np.array_equal(found, processor.finish(raw, state))
    monkeypatch.setattr(processor, "relative", np.array([True] * 6 + [False]))
    finish, base = processor.finish_on(CPU), processor.base(state)
    found = finish(torch.from_numpy(raw), torch.from_numpy(base))
    assert np.array_equal(found.numpy(), processor.finish(raw, state))
    assert not np.array_equal(base, np.zeros(7))


def test_tables_are_not_made_while_a_call_is_captured(engine):
    with Strict(), pytest.raises(AssertionError, match="lift_fresh cannot be captured"):
        engine.model.policy.table(2)


def test_nothing_is_captured_after_the_warm_up(goldens):
    with Engine("pi05-tiny") as engine:
        recorded = []
        capturing(engine, 1, recorded)
        rooms = engine.model.whole._rooms
        assert (rooms[0], rooms[-1], len(rooms)) == (32, 200, 7)
        engine.model.whole._rooms = rooms[1:3]
        engine.warmup()
        policy = engine.policy()
        policy.warmup()
        assert len(recorded) == 3 * 2 * 2  # cameras, lengths, with and without a hard prefix
        cases = every_case(goldens)
        for name in ("actions 0", "masked 1", "guided LINEAR", "trained"):
            engine.generate(**cases[name][0])
        assert len(recorded) == 12
        engine.generate(**cases["4 steps"][0])
        assert len(recorded) == 13
        engine.generate(**{**cases["4 steps"][0], "num_steps": 65})
        assert len(recorded) == 13


def test_the_option(goldens):
    request = asked(goldens, 0)
    with Engine("pi05-tiny", options={"batch": 2}) as engine:
        assert list(engine.stats()["nodes"]) == ["act"]
        expected, found = engine.act(**request), {}

        def robot(index):
            found[index] = engine.act(**request)

        robots = [Thread(target=robot, args=(index,)) for index in range(5)]
        for thread in robots:
            thread.start()
        for thread in robots:
            thread.join()
        assert all(np.array_equal(found[index], expected) for index in range(5))
    for value in (0, 65, 2.0, True):
        with pytest.raises(InvalidRequest, match=r"batch=.*must be from 1 to 64"):
            Engine("pi05-tiny", options={"batch": value})


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_every_golden_on_a_gpu(rows, goldens):
    cases = every_case(goldens)
    options = {"device": "cuda", "dtype": "float32", "options": {"batch": rows}}
    with Engine("pi05-tiny", **options) as engine:
        captured = engine.model.whole._captured
        ready, alone = len(captured), {}
        for name, (request, expected, _) in cases.items():
            alone[name] = engine.generate(**request).actions
            np.testing.assert_allclose(alone[name], expected, atol=1e-3, rtol=0, err_msg=name)
        assert len(captured) == ready + 2  # flows of 1 and of 4 steps
        handles = {name: engine.submit(**request) for name, (request, *_) in cases.items()}
        for name, handle in handles.items():
            assert np.array_equal(handle.result().actions, alone[name]), name
