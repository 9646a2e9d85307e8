"""What `model` and `weights` mean, and models that other packages add."""

import json
import sys
import types
import warnings

import pytest

from mstar.errors import InvalidRequest, ModelNotFound
from mstar.models import registry
from mstar.models.card import ModelCard
from mstar.models.orpheus.card import CARD
from mstar.models.parameters import Parameters

TINY = CARD.tiny
BUILT_IN = list(registry._BUILTIN)
ORPHEUS_CONFIG = {"model_type": "llama", "vocab_size": 156940}

TOY = ModelCard(
    name="toy",
    title="A toy",
    entry="collections:Counter",
    inputs=("text",),
    outputs=("text", "image"),
    parameters=Parameters("toy"),
    repos={"net": "someone/toy"},
    recognises=lambda config: config["model_type"] == "toy",
)


class Plugin:
    """As much of an entry point as the registry uses."""

    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"{name}_package:CARD", load


@pytest.fixture
def plugins(monkeypatch):
    found = []
    monkeypatch.setattr(registry, "entry_points", lambda group: list(found))
    return found


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds the given configs; counts what is asked of it."""
    fake = types.ModuleType("mstar.engine.hub")
    fake.configs, fake.asked = {}, []

    def resolve(source, *, patterns, progress=True):
        fake.asked.append((source, tuple(patterns)))
        if source not in fake.configs:
            raise ModelNotFound(f"no repository {source}")
        return folder(tmp_path / source.replace("/", "--"), fake.configs[source])

    fake.resolve = resolve
    monkeypatch.setitem(sys.modules, "mstar.engine.hub", fake)
    return fake


def folder(path, config=None):
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


# names


def test_a_name_stands_for_the_published_repositories():
    target = registry.find("orpheus")
    assert target.card is CARD
    assert target.sources == CARD.repos
    assert not target.tiny


def test_tiny_stands_for_the_folders_inside_the_package():
    target = registry.find("orpheus-tiny")
    assert target.tiny
    assert target.sources == {"lm": TINY / "lm", "snac": TINY / "snac"}
    assert all((source / "config.json").is_file() for source in target.sources.values())


def test_an_unknown_name_is_refused_with_the_nearest_and_all_known():
    with pytest.raises(ModelNotFound, match=r"did you mean 'orpheus-tiny'.*known names: .*orpheus"):
        registry.find("orpheus-tinny")
    with pytest.raises(ModelNotFound, match=r"known: .*orpheus"):
        registry.get("nothing")
    with pytest.raises(ModelNotFound):
        registry.find("")


# repositories


@pytest.mark.parametrize(
    "repo",
    [
        "canopylabs/orpheus-3b-0.1-ft",
        "canopylabs/3b-de-ft-research_release",
        "canopylabs/orpheus-3b-0.1-ft@main",
    ],
)
def test_a_known_repository_is_found_without_the_hub(hub, repo):
    target = registry.find(repo)
    assert target.card is CARD
    assert target.sources == {"lm": repo, "snac": CARD.repos["snac"]}
    assert hub.asked == []


def test_another_repository_is_told_by_its_config_alone(hub):
    hub.configs["me/my-orpheus"] = ORPHEUS_CONFIG
    target = registry.find("me/my-orpheus")
    assert target.sources == {"lm": "me/my-orpheus", "snac": CARD.repos["snac"]}
    assert hub.asked == [("me/my-orpheus", ("config.json",))]


def test_a_repository_of_no_known_family_is_refused(hub):
    hub.configs["me/llama"] = {"model_type": "llama", "vocab_size": 128256}
    with pytest.raises(ModelNotFound, match=r"me/llama.*no known family"):
        registry.find("me/llama")
    with pytest.raises(ModelNotFound, match="no repository"):
        registry.find("me/absent")


# folders


def test_a_folder_is_told_by_its_config(tmp_path):
    place = folder(tmp_path / "w", ORPHEUS_CONFIG)
    for model in (place, str(place)):
        target = registry.find(model)
        assert target.sources == {"lm": place, "snac": CARD.repos["snac"]}


def test_a_folder_can_hold_one_subfolder_per_part():
    assert registry.find(TINY).sources == {"lm": TINY / "lm", "snac": TINY / "snac"}


def test_a_folder_of_no_known_family_says_what_was_looked_at(tmp_path):
    place = folder(tmp_path / "w", {"model_type": "llama", "vocab_size": 5})
    with pytest.raises(ModelNotFound) as info:
        registry.find(place)
    assert str(place / "config.json") in str(info.value)
    assert "vocab_size=5" in str(info.value)
    assert str(place / "lm" / "config.json") in str(info.value)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelNotFound):
        registry.find(tmp_path)


@pytest.mark.parametrize("model", ["./nowhere", "/no/where/at/all", "~/nowhere-at-all"])
def test_a_path_that_is_not_there_is_not_taken_for_a_name(model):
    with pytest.raises(ModelNotFound, match="no folder"):
        registry.find(model)


# weights


def test_weights_replace_the_parts_that_they_name(tmp_path):
    target = registry.find("orpheus", {"snac": TINY / "snac", "lm": "me/lm"})
    assert target.sources == {"lm": "me/lm", "snac": TINY / "snac"}
    assert registry.find("orpheus", {"lm": str(tmp_path)}).sources == {
        "lm": tmp_path,
        "snac": CARD.repos["snac"],
    }


def test_weights_in_one_folder(tmp_path):
    assert registry.find("orpheus", TINY).sources == {"lm": TINY / "lm", "snac": TINY / "snac"}
    assert registry.find("orpheus", tmp_path).sources["lm"] == tmp_path
    assert registry.find("orpheus", "me/other").sources["lm"] == "me/other"


def test_weights_beside_the_tiny_checkpoint(tmp_path):
    target = registry.find("orpheus-tiny", {"lm": tmp_path})
    assert target.sources == {"lm": tmp_path, "snac": TINY / "snac"}
    assert not target.tiny


def test_wrong_weights_are_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="parts lm, snac"):
        registry.find("orpheus", {"codec": tmp_path})
    with pytest.raises(ModelNotFound, match="weights"):
        registry.find("orpheus", "nonsense")
    with pytest.raises(ModelNotFound, match="no folder"):
        registry.find("orpheus", {"lm": "./nowhere"})
    with pytest.raises(InvalidRequest, match="weights"):
        registry.find("orpheus", 5)


# plug-ins


def test_another_package_can_add_a_model(plugins, tmp_path):
    plugins.append(Plugin("toy", lambda: TOY))
    assert registry.names() == [*BUILT_IN, "toy"]
    assert registry.get("toy") is TOY
    assert registry.find("toy").sources == {"net": "someone/toy"}
    assert registry.find(folder(tmp_path / "t", {"model_type": "toy"})).card is TOY
    assert TOY.load_class().__name__ == "Counter"
    assert TOY.default_output == ("text",)
    with pytest.raises(ModelNotFound, match="no tiny checkpoint"):
        registry.find("toy-tiny")


def test_a_broken_plug_in_is_reported_and_breaks_nothing_else(plugins):
    def broken():
        raise ImportError("no such thing")

    plugins += [Plugin("bad", broken), Plugin("odd", lambda: CARD), Plugin("toy", lambda: TOY)]
    with pytest.warns(UserWarning, match="no such thing") as caught:
        found = list(registry.cards())
    assert [card.name for card in found] == [*BUILT_IN, "toy"]
    assert any("odd_package:CARD is not a ModelCard named 'odd'" in str(w.message) for w in caught)
    with pytest.raises(ModelNotFound, match="failed to load: ImportError: no such thing"):
        registry.get("bad")


def test_a_plug_in_cannot_replace_a_built_in_model(plugins):
    plugins.append(Plugin("orpheus", lambda: TOY))
    with pytest.warns(UserWarning, match="cannot replace"):
        assert registry.names() == BUILT_IN
    assert registry.get("orpheus") is CARD


def test_a_plug_in_that_trips_over_a_config_is_passed_over(plugins):
    plugins.append(Plugin("toy", lambda: TOY))
    with pytest.warns(UserWarning, match="toy could not look"):
        assert registry.identify({}) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.identify(ORPHEUS_CONFIG) is CARD


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(empty):
    with pytest.raises(ModelNotFound):
        registry.find("orpheus", empty)
    with pytest.raises(ModelNotFound):
        registry.find(empty)
