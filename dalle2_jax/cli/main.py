"""The command `dalle2`: finds the module of a subcommand and runs its `main`.

    dalle2 COMMAND [WORD ...] [--flag=value ...]

A subcommand is a module with a function `main`. Its flags are defined when the module is imported,
and only the chosen one is, so that `dalle2 generate` neither loads TensorFlow nor knows the flags
of `dalle2 train`. What a module's `main` takes beside flags is named in its constant `WORDS`; its
function `prepare`, if any, runs before the flags are read, and sets how signals are handled.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from dalle2_jax.cli import commands
from dalle2_jax.errors import near_miss


class Command(NamedTuple):
    """A subcommand: the module with its `main`, and a line for the list of commands."""

    module: str
    summary: str


# What stands after `dalle2`: one word, or two for a group of commands.
COMMANDS = {
    "generate": Command("dalle2_jax.cli.generate", "generate images from prompts"),
    "edit": Command("dalle2_jax.cli.edit", "vary, interpolate, inpaint or extend images"),
    "train": Command("dalle2_jax.cli.train", "train one stage"),
    "topology": Command("dalle2_jax.cli.topology_command", "compile for a TPU slice; run nothing"),
    "weights": Command("dalle2_jax.cli.weights", "import or export public weights"),
    "data emoji": Command("dalle2_jax.cli.data_emoji", "render the emoji data set"),
    "evals report": Command("dalle2_jax.cli.evals.report", "judge a model: retrieval, Frechet"),
    "evals inpainting": Command("dalle2_jax.cli.evals.inpainting", "judge regenerated parts"),
    "evals inversion": Command("dalle2_jax.cli.evals.inversion", "PSNR of reconstructions"),
    "evals manipulations": Command("dalle2_jax.cli.evals.manipulations", "judge edited images"),
    "evals priors": Command("dalle2_jax.cli.evals.priors", "compare a folder's priors"),
    "evals solvers": Command("dalle2_jax.cli.evals.solvers", "compare solvers and steps"),
    "evals upsampling": Command("dalle2_jax.cli.evals.upsampling", "measure the upsamplers"),
}
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def main() -> None:
    """Runs `dalle2` with the arguments of the process, and exits."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "-help", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    length = 2 if arguments[0] in GROUPS else 1
    name = " ".join(arguments[:length])
    if name not in COMMANDS:
        sys.exit(refuse(name))
    module = importlib.import_module(COMMANDS[name].module)
    program = f"dalle2 {name}"
    sys.argv = [program, *arguments[length:]]
    # absl shows the docstring of the main module as the text of --help.
    sys.modules["__main__"].__doc__ = module.__doc__
    if hasattr(module, "prepare"):
        module.prepare()
    commands.run(module.main, words=getattr(module, "WORDS", ()), program=program)


def refuse(name: str) -> int:
    """Prints one line about an unknown command and returns the exit status of a mistake."""
    group, _, word = name.partition(" ")
    if group in GROUPS and (not word or word.startswith("-")):
        names = [known for known in COMMANDS if known.startswith(f"{group} ")]
        return commands.say(f"write one of: {', '.join(names)}", program="dalle2")
    return commands.say(f"unknown command {name!r}{near_miss(name, COMMANDS)}", program="dalle2")


def usage() -> str:
    """Returns the list of commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "dalle2 COMMAND --flag=value ...",
            "",
            *lines,
            "",
            "`dalle2 COMMAND --help` shows a command's flags: `dalle2 evals report --help`.",
        ]
    )


if __name__ == "__main__":
    main()
