"""Sections of a config become objects; the error for a wrong key names the near miss."""

import dataclasses
import json

import flax.linen as nn
import pytest
from ml_collections import ConfigDict

from dalle2_jax.errors import UserError, near_miss
from dalle2_jax.validation.sections import check_keys, construct, to_json_values


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int
    mults: tuple = (1, 2)
    rate: float = 0.1
    hidden: int = dataclasses.field(default=3, init=False)


class Layer(nn.Module):
    width: int
    inner: dict


def test_near_miss_names_the_key_or_lists_all():
    assert near_miss("widht", ["width", "depth"]) == "; did you mean 'width'?"
    assert near_miss("zzz", ["width", "depth"]) == "; known: depth, width"
    assert "'optimizer.b1'" in near_miss("optimizr.b1", ["optimizer.b1", "seed"])


def test_check_keys_names_the_section():
    check_keys(["width"], iter(["width", "depth"]), "config.model")
    with pytest.raises(UserError, match=r"config.model: unknown key 'widht'; did you mean 'width'"):
        check_keys(["width", "widht"], ["width", "depth"], "config.model")


def test_constructed_objects_are_hashable():
    settings = construct(Settings, ConfigDict({"width": 4, "mults": [1, [2, 3]]}), "config.model")
    assert settings == Settings(4, (1, (2, 3)))
    assert isinstance(hash(settings), int)
    layer = construct(Layer, ConfigDict({"inner": {"mults": [1, 2]}}), "config.model", width=3)
    assert layer.width == 3 and layer.inner["mults"] == (1, 2)
    assert isinstance(hash(layer), int)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"width": 1, "widht": 2}, "config.model: unknown key 'widht'; did you mean 'width'"),
        ({"mults": (1,)}, "config.model: the key 'width' is missing"),
        ({"width": 1, "hidden": 2}, "unknown key 'hidden'"),
        ({"width": 1, "rate": 2}, "unknown key 'rate'"),  # an argument of `construct`
    ],
)
def test_construct_refuses_wrong_keys(section, message):
    with pytest.raises(UserError, match=message):
        construct(Settings, section, "config.model", rate=0.5)


def test_a_modules_name_and_parent_are_no_settings():
    for key in ("name", "parent"):
        with pytest.raises(UserError, match=f"unknown key '{key}'"):
            construct(Layer, {"width": 1, "inner": {}, key: None}, "config.model")


def test_json_values_survive_json():
    section = ConfigDict({"a": {"b": (1, 2), "c": [{"d": None}]}, "e": 1.5, "f": "x"})
    want = {"a": {"b": [1, 2], "c": [{"d": None}]}, "e": 1.5, "f": "x"}
    assert to_json_values(section) == want == json.loads(json.dumps(to_json_values(section)))
