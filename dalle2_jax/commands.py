"""What every command shares: flags and mistakes told in one line, compiled programs kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging

from dalle2_jax.errors import UserError

NOISY = ("orbax", "xla_bridge")  # lines that say nothing to a user: which backends there are not
TRAINING_LIBRARIES = ("tensorflow", "tensorflow_datasets", "clu", "optax", "orbax", "resvg_py")


def say(error: Exception | str, status: int = 2) -> int:
    """Prints one line to stderr; returns `status`."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, runs `main` and exits: 0 or what it returns, 2 for a user's mistake."""

    def guarded(argv: list[str]) -> int:
        if len(argv) > 1:
            return say(f"unknown argument {argv[1]!r}: flags start with --")
        try:
            return main() or 0
        except UserError as error:
            return say(error)
        except ModuleNotFoundError as error:
            return say(_missing(error))

    logging.get_absl_handler().addFilter(lambda r: not any(n in r.pathname for n in NOISY))
    app.run(guarded, flags_parser=_parse_flags)


def _missing(error: ModuleNotFoundError) -> str:
    """What to install; raises `error` again where it is no library of training."""
    if (error.name or "").split(".")[0] not in TRAINING_LIBRARIES:
        raise error
    return f"{error.name} is not installed: in the project's folder, pip install -e '.[train]'"


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except ModuleNotFoundError as error:  # some settings are known to training's libraries alone
        sys.exit(say(_missing(error)))
    except (flags.Error, TypeError, ValueError) as error:  # a config file raises what it likes
        sys.exit(say(error))


def keep_compiled_programs() -> None:
    """JAX's compilation cache, in the user's cache folder: a second run starts fast."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in a container
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "dalle2_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
