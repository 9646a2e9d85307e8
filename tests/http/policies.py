"""Policies of the goldens behind a websocket, as `mstar serve` would serve them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from safetensors.torch import load_file
from websockets.sync.client import ClientConnection, connect

from mstar import Engine
from mstar.http import create_app
from mstar.http.msgpack_numpy import packb, unpackb
from mstar.http.server import Listening, bind, config_of
from mstar.models import pi05
from tests.http.conftest import Site

DATA = Path(__file__).parents[1] / "data" / "pi05"
TINY = Path(pi05.__file__).parent / "tiny" / "pi05"
FACTS: dict[str, Any] = json.loads((DATA / "goldens.json").read_text())["openpi"]
GOLDENS = load_file(DATA / "goldens.safetensors")
ROBOTS = ("droid", "libero", "aloha")
_KEPT = ("custom_dims", "image_resolution", "paligemma_variant", "action_expert_variant")


def observation(robot: str) -> dict[str, Any]:
    """The observation of a golden case, with its images."""
    found = dict(FACTS[robot]["obs"])
    if robot == "libero":
        return {k: picture(v) if "image" in k else v for k, v in found.items()}
    if robot == "droid":
        base, wrist = "observation/exterior_image_1_left", "observation/wrist_image_left"
        found[base] = picture(found[base])
        pixels = picture("obs0_left_wrist_0_rgb.png").transpose(2, 0, 1)
        return {**found, wrist: pixels.astype(np.float32) / 255}
    files = {"cam_high": "obs0_base_0_rgb.png", "cam_right_wrist": "obs1_right_wrist_0_rgb.png"}
    return {**found, "images": {k: picture(v).transpose(2, 0, 1) for k, v in files.items()}}


def actions(robot: str) -> np.ndarray:
    """What the published server answers to it."""
    return GOLDENS[f"openpi.{robot}.actions"].numpy()


def picture(file: str) -> np.ndarray:
    """Bytes `[height, width, 3]` of a PNG of the goldens."""
    return np.array(Image.open(DATA / Path(file).name).convert("RGB"))


def saved_by_openpi(folder: Path, robot: str) -> Path:
    """The tiny policy as openpi would have saved it after training on that robot."""
    (folder / "assets" / robot).mkdir(parents=True)
    (folder / "assets" / robot / "norm_stats.json").write_text(
        json.dumps(FACTS["norm_stats"][robot])
    )
    config = json.loads((TINY / "config.json").read_text())
    config = {name: config[name] for name in _KEPT if name in config}
    config |= {"action_horizon": 10, "action_dim": 32, "discrete_state_input": True}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer"):
        (folder / name).symlink_to(TINY / name)
    return folder


@contextlib.contextmanager
def golden_policy(folder: Path, robot: str, **options: Any) -> Iterator[Site]:
    """A policy for one robot; its noise is always that of the goldens."""
    with Engine("pi05", weights=saved_by_openpi(folder, robot)) as engine:
        engine.model._noise = lambda params: GOLDENS["openpi.noise"]
        with served(engine, robot=robot, **options) as site:
            yield site


@contextlib.contextmanager
def served(engine: Any, listening: Listening | None = None, **options: Any) -> Iterator[Site]:
    """An app of `create_app` under uvicorn, configured as `mstar serve` does it."""
    app = create_app(engine, **options)
    config = config_of(app, listening or Listening())
    config.timeout_graceful_shutdown = 2
    server = uvicorn.Server(config)
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, app)
        finally:
            server.should_exit = True
            thread.join(10)


def joined(url: str, path: str = "/", **options: Any) -> ClientConnection:
    """A connection, made as the published client makes it."""
    place = url.replace("http://", "ws://") + path
    return connect(place, compression=None, max_size=None, open_timeout=10, **options)


def asked(connection: ClientConnection, observation: Any) -> Any:
    """The answer to an observation, or to a frame as it is: a map, or the text of an error."""
    connection.send(observation if isinstance(observation, (bytes, str)) else packb(observation))
    answer = connection.recv(10)
    return answer if isinstance(answer, str) else unpackb(answer)
