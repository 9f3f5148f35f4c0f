"""The command `dalle2`: its table of commands, and what it says to unknown ones."""

import importlib

import pytest
from command import MAIN, run

from dalle2_jax.cli import main as cli


def dalle2(*words):
    return run(*MAIN, *words)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_with_a_main(name):
    # Found, not imported: importing one would define its flags beside those of another.
    spec = importlib.util.find_spec(cli.COMMANDS[name].module)
    assert spec is not None
    with open(spec.origin, encoding="utf-8") as file:
        assert "\ndef main(" in file.read()


def test_alone_it_lists_the_commands():
    done = dalle2()
    assert done.returncode == 2
    assert [name for name in cli.COMMANDS if f"  {name} " not in done.stdout] == []
    assert dalle2("--help").stdout == done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generat"], "dalle2: unknown command 'generat'; did you mean 'generate'?"),
        (
            ["evals", "invertion"],
            "unknown command 'evals invertion'; did you mean 'evals inv",
        ),
        (["evals"], "dalle2: write one of: evals report, evals inpainting"),
        (["data", "--out=x"], "dalle2: write one of: data emoji"),
        (["--prompt=x"], "dalle2: unknown command '--prompt=x'; known: data emoji"),
    ],
)
def test_an_unknown_command_is_one_line(words, message):
    done = dalle2(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
