"""The table of stages: every name resolves, families match, unknown names are refused."""

from pathlib import Path

import flax.linen as nn
import pytest

from dalle2_jax import stages
from dalle2_jax.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("row", stages.STAGES, ids=lambda row: row.name)
def test_every_column_resolves(row):
    assert issubclass(stages.resolve(row.network), nn.Module)
    if row.sampler is not None:
        assert isinstance(stages.resolve(row.sampler), type)
    task = stages.resolve(row.task)
    assert callable(task.from_config)
    assert task.SECTIONS["model"] is stages.resolve(row.network)


def test_every_config_file_belongs_to_a_stage():
    assert sorted(stages.configs()) == sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))


def test_a_family_has_one_row_for_all_of_its_sizes():
    assert stages.find("upsampler_128") is stages.find("upsampler_1024")
    assert stages.find("upsampler_128").family == "upsampler"
    assert stages.find_family("upsampler", "config.task.name") is stages.find("upsampler_64")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("decodr", "did you mean 'decoder'"),
        ("upsampler", "did you mean 'upsampler_<px>'"),
        ("upsampler_", "did you mean 'upsampler_<px>'"),
        ("upsampler_0128", "did you mean 'upsampler_<px>'"),
        ("upsampler_128\n", "did you mean 'upsampler_<px>'"),
        ("vae", "known: ar_prior, clip, decoder, prior, upsampler_<px>"),
    ],
)
def test_an_unknown_stage_is_refused_with_a_hint(name, hint):
    with pytest.raises(UserError, match=hint):
        stages.find(name)


def test_an_unknown_family_is_refused_with_a_hint():
    with pytest.raises(UserError, match=r"config\.task\.name: .*did you mean 'ar_prior'"):
        stages.find_family("ar_priors", "config.task.name")
