"""The flag --config: reads FILE:VARIANT, completes it, and applies --config.KEY=VALUE."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from ml_collections import ConfigDict, config_flags

from dalle2_jax.build import Config, read_config
from dalle2_jax.validation.sections import check_keys


class ConfigParser(config_flags.config_flags.ConfigFileFlagParser):
    """Parses FILE:VARIANT and completes the config before --config.KEY=VALUE are applied.

    So every override has a type, and may name a setting that the file leaves at its default.
    """

    path = ""  # FILE:VARIANT as on the command line

    def parse(self, path: str) -> Config:
        self.path = path
        config = read_config(path)
        check_overrides(sys.argv[1:], config)
        return config


def check_overrides(arguments: Iterable[str], config: Config) -> None:
    """Raises UserError for a `--config.KEY` among `arguments` that a complete config lacks."""
    keys = _dotted_keys(config)
    for argument in arguments:
        if match := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            check_keys([match[1]], keys, "--config.*")


def _dotted_keys(config: Config, prefix: str = "") -> list[str]:
    """Returns the keys of a config and of its sections, as `optimizer.learning_rate`."""
    keys = []
    for key, value in config.items():
        keys.append(prefix + key)
        if isinstance(value, ConfigDict):
            keys += _dotted_keys(value, f"{prefix}{key}.")
    return keys
