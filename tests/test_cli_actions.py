"""Actions from the shell: files, pipes, and the picture of them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mstar import cli
from mstar.errors import RequestFailed
from mstar.io.plot import plot_actions, ticks
from mstar.io.save import encode
from mstar.types import GenerateResult

DATA = Path(__file__).parent / "data" / "pi05"
IMAGES = "-a", str(DATA / "obs0_base_0_rgb.png"), "-a", str(DATA / "obs0_left_wrist_0_rgb.png")
STATE = "robot_state=[0, 0.1, -0.2, 0.3, 0, 0, 0, 1]"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def mstar(*args):
    return CliRunner().invoke(cli.app, ["generate", *args])


def act(*args):
    return mstar("pi05-tiny", "pick up the cup", *IMAGES, "-s", STATE, "-s", "seed=1", *args)


def test_actions_go_to_files_of_every_kind():
    done = act("-o", "a.json", "-o", "a.npy", "-o", "a.csv", "--plot", "a.png")
    assert done.exit_code == 0, done.output
    for name in ("a.json", "a.npy", "a.csv", "a.png"):
        assert f"wrote {name}" in done.stderr
    expected = np.load("a.npy")
    assert (expected.dtype, expected.shape) == (np.float32, (10, 7))
    assert np.array_equal(np.float32(json.loads(Path("a.json").read_text())["actions"]), expected)
    head, *lines = Path("a.csv").read_text().splitlines()
    assert head == ",".join(f"action_{index}" for index in range(7))
    assert np.array_equal(np.float32([line.split(",") for line in lines]), expected)
    assert Image.open("a.png").size == (900, 570)


def test_a_pipe_gets_an_array_and_json_names_the_files():
    done = act("-o", "-")
    assert np.load(io.BytesIO(done.stdout_bytes)).shape == (10, 7)
    done = act("--plot", "only.png", "--json")
    assert json.loads(done.stdout)["files"] == ["only.png"]
    assert Path("only.png").exists()


def test_what_is_there_is_kept_unless_forced():
    Path("a.png").write_bytes(b"mine")
    done = act("--plot", "a.png")
    assert (done.exit_code, Path("a.png").read_bytes()) == (2, b"mine")
    assert "--plot='a.png': exists already; --force overwrites it" in done.stderr
    assert act("--plot", "a.png", "--force").exit_code == 0
    assert Image.open("a.png").format == "PNG"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "action needs a file to go to: -o NAME with one of .npy .npz .csv .json"),
        (("-o", "a.wav"), "such a file holds audio; pi05 makes action"),
        (("-o", "a.csv", "--plot", "a.jpg"), "--plot='a.jpg': is drawn as a .png"),
        (("--plot", "none/a.png"), "there is no folder none"),
        (("-m", "text", "-o", "a.csv"), "pi05 makes action"),
        (("-o", "a.csv", "-s", "robot_state=[1]"), "robot_state is given twice"),
        (("-o", "a.csv", "-s", "num_steps=0"), "from 1 to 1000"),
    ],
)
def test_what_cannot_be_is_refused(args, message):
    done = act(*args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*IMAGES, "-o", "a.csv"), "error: robot_state: is missing"),
        ((*IMAGES, "-o", "a.csv", "-s", "robot_state=[1, 2]"), "'2 numbers': must be 8 numbers"),
        ((*IMAGES, "-o", "a.csv", "-s", "robot_state=x"), "must be an array of numbers"),
        (("-s", STATE, "-o", "a.csv"), "at least one of base_0_rgb"),
        (("-s", STATE, "-a", __file__, *IMAGES * 2, "-o", "a.csv"), "has 3 cameras"),
    ],
)
def test_observations_that_are_none(args, message):
    done = mstar("pi05-tiny", "go", *args)
    assert done.exit_code == 2
    assert message in done.stderr


def test_only_models_that_act_have_actions_to_draw():
    done = mstar("orpheus-tiny", "Hello", "-o", "a.wav", "--plot", "a.png")
    assert done.exit_code == 2
    assert "--plot='a.png': draws actions; what is made is audio" in done.stderr


# -- files ---------------------------------------------------------------------------------------


def test_a_table_is_exact():
    actions = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32) * 1e-3
    lines = encode(GenerateResult(actions=actions), ".csv").decode().splitlines()
    found = np.float32([line.split(",") for line in lines[1:]])
    assert np.array_equal(found, actions)
    with pytest.raises(RequestFailed, match="made no action"):
        encode(GenerateResult(), ".csv")


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (50, 14), (100, 32), (7, 70)])
def test_a_plot_has_a_panel_for_every_dimension(shape):
    actions = np.random.default_rng(0).standard_normal(shape)
    image = Image.open(io.BytesIO(plot_actions(actions)))
    panels = (image.width // 300) * (image.height // 190)
    assert panels >= min(shape[1], 64)
    assert len(image.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize("value", [0.0, 1e6, -3e-9])
def test_a_robot_that_stands_still_can_be_drawn(value):
    assert Image.open(io.BytesIO(plot_actions(np.full((5, 1), value)))).size == (300, 190)


def test_what_cannot_be_drawn():
    for actions in (np.zeros((0, 3)), np.zeros(3), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="cannot draw"):
            plot_actions(actions)


@pytest.mark.parametrize(
    ("ends", "most", "expected"),
    [
        ((0, 9), 6, [0, 2, 4, 6, 8]),
        ((-1.05, 1.05), 5, [-1, 0, 1]),
        ((0.0, 0.4), 5, [0, 0.1, 0.2, 0.3, 0.4]),
        ((3, 3), 5, [3]),
    ],
)
def test_ticks_are_round_numbers(ends, most, expected):
    assert ticks(*ends, most) == pytest.approx(expected)
