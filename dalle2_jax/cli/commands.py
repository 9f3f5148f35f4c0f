"""Flags, exit status and one-line errors of every command; the cache of compiled programs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.storage import cache


def _name() -> str:
    """Returns the name of the program: `sample.py`, or `dalle2`."""
    spec = sys.modules["__main__"].__spec__
    return "dalle2" if spec else Path(sys.argv[0]).name


try:
    from absl import app, flags, logging
except ModuleNotFoundError:  # another Python than that of .venv, without any library
    print(
        f"{_name()}: the project's libraries are not installed in {sys.executable}: "
        "run `make demo` and `. .venv/bin/activate`, or pip install -e . in the project's folder",
        file=sys.stderr,
    )
    sys.exit(2)

# Modules whose log lines do not help a user: they list, for instance, the backends that are absent.
NOISY = ("orbax", "xla_bridge")
TRAINING_LIBRARIES = ("tensorflow", "tensorflow_datasets", "clu", "optax", "orbax", "resvg_py")

_program = ""  # the name shown before messages; "": that of the script


def say(error: Exception | str, status: int = 2, program: str = "") -> int:
    """Prints one line to stderr, `sample.py: ...` or `dalle2 train: ...`; returns `status`."""
    name = program or _program or _name()
    print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def run(
    main: Callable[..., int | None], words: Sequence[str] = (), program: str | None = None
) -> None:
    """Parses the flags, runs `main` and exits: 0 or what it returns, 2 for a user's mistake.

    Ctrl-C is one line and status 130, after `main` cleaned up; `stop` and `stop_at_once` are for
    commands that have nothing to clean up.

    Args:
        main: called with the words that stand beside the flags.
        words: what these must be, as in ("import", "SOURCE"): a word in capitals stands for any
            word, another for itself.
        program: the name shown before messages; None: that of the script.
    """
    global _program
    _program = program or ""

    def guarded(argv: list[str]) -> int:
        arguments = argv[1:]
        if not words and arguments:
            return say(f"unknown argument {arguments[0]!r}: flags start with --")
        pairs = zip(words, arguments, strict=False)
        fits = all(word.isupper() or word == argument for word, argument in pairs)
        if len(arguments) != len(words) or not fits:
            return say(f"write {' '.join(words)} beside the flags, not {' '.join(arguments)!r}")
        try:
            return main(*arguments) or 0
        except UserError as error:
            return say(error, error.exit_status)
        except ModuleNotFoundError as error:
            return say(_missing(error))
        except BrokenPipeError:  # whoever read the output, as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    logging.get_absl_handler().addFilter(lambda r: not any(n in r.pathname for n in NOISY))
    try:
        app.run(guarded, flags_parser=_parse_flags)
    except KeyboardInterrupt:
        sys.exit(_say_stopped())


def _say_stopped() -> int:
    """Prints that Ctrl-C stopped the command; returns its exit status."""
    print(file=sys.stderr)  # ends the line of ^C or of a bar
    return say("stopped", 128 + signal.SIGINT)


def stop(number: int = signal.SIGINT, *_: object) -> None:
    """Ends the process with one line; a handler of SIGINT and SIGTERM.

    The status after SIGTERM is 0: the run was asked to end and has lost nothing. For commands that
    leave nothing half written when they are killed: JAX runs Python code from places that swallow a
    KeyboardInterrupt.
    """
    try:
        _say_stopped()
    finally:  # a handler that interrupts another print cannot print, but has to end the process
        os._exit(0 if number == signal.SIGTERM else 128 + signal.SIGINT)


def stop_at_once() -> None:
    """Makes Ctrl-C act as `stop` does, even while XLA compiles.

    A signal handler in Python runs only between two bytecodes, so it would wait until XLA is done;
    a thread that waits for the signal does not. A file that is being written then stays behind as
    a hidden .tmp file.
    """
    # Blocked here and in all threads that start later, so that only `wait` receives the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        stop()

    threading.Thread(target=wait, daemon=True).start()


def _missing(error: ModuleNotFoundError) -> str:
    """Returns which library to install; raises `error` again unless it is one of training's."""
    if (error.name or "").split(".")[0] not in TRAINING_LIBRARIES:
        raise error
    return f"{error.name} is not installed: in the project's folder, pip install -e '.[train]'"


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags, shows the help, and prints a mistake as one line; returns the words."""
    if not {"-h", "-help", "--help"}.isdisjoint(argv[1:]):  # absl knows no -h, and exits with 1
        for module, defined in flags.FLAGS.flags_by_module_dict().items():
            for flag in defined if module.startswith("dalle2_jax.") else ():
                # absl shows only the flags of the main module, and of those registered here.
                flags.FLAGS.register_key_flag_for_module(argv[0], flag)
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except ModuleNotFoundError as error:  # some settings are known to training's libraries alone
        sys.exit(say(_missing(error)))
    except (flags.Error, TypeError, ValueError) as error:  # a config file raises what it likes
        sys.exit(say(error))


def by_stage(flag: flags.FlagHolder, read: Callable[[str], object], form: str) -> object:
    """Reads a flag of one value, or of STAGE=VALUE,...

    `--steps=50` gives 50, `--steps=prior=16,decoder=50` gives {"prior": 16, "decoder": 50}, no flag
    None. `form` says in an error what a value looks like. Raises UserError.
    """
    if flag.value is None:
        return None
    try:
        if "=" not in flag.value:
            return read(flag.value)
        pairs = [part.split("=") for part in flag.value.split(",")]
        values = {stage.strip(): read(value) for stage, value in pairs}
    except ValueError:
        raise UserError(
            f"--{flag.name}={flag.value}: write {form}, or one for each STAGE=...,..."
        ) from None
    if len(values) < len(pairs):
        raise UserError(f"--{flag.name}={flag.value}: a stage is named twice")
    return values


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts fast.

    Does nothing if the variable JAX_COMPILATION_CACHE_DIR names another folder, which JAX reads.
    """
    import jax  # late, so that mistakes in the flags are reported at once

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return

    folder = cache.user_folder()
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
