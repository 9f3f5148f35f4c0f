"""Runs this project's commands as processes that start at once.

A new interpreter takes seconds of CPU to import JAX and Flax, and as long again for TensorFlow. A
server process imports them once and forks a child for every command. The child has its own
arguments, environment, working folder, standard streams and exit status, and runs the script as
`__main__`; flags are defined in it alone, because the server imports no module of `dalle2_jax.cli`.

    MAIN              the command `dalle2` as arguments of Python
    run(*arguments)   -> subprocess.CompletedProcess, with text

What a command imports, how signals end it, and variables that JAX reads while it is imported are
tested with a new interpreter instead (`subprocess`).
"""

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = ("-m", "dalle2_jax.cli.main")
GENERATING = ("dalle2_jax.pipelines.dalle2",)
TRAINING = (*GENERATING, "dalle2_jax.build", "dalle2_jax.data.pipeline", "dalle2_jax.train.loop")


def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` in the project's folder: a script, or `*MAIN` and a command."""
    is_dalle2 = arguments[: len(MAIN)] == MAIN
    name = next(iter(arguments[len(MAIN) :] if is_dalle2 else arguments), "")
    imports = GENERATING if name in ("sample.py", "generate", "edit") else TRAINING
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"{folder}/stdout", f"{folder}/stderr"]
        request = [arguments, dict(os.environ if env is None else env), streams]
        server = _server(imports)
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of commands has ended with status {server.wait()}"
        stdout, stderr = (Path(stream).read_text() for stream in streams)
        return subprocess.CompletedProcess(arguments, int(answer), stdout, stderr)


@functools.cache
def _server(imports: tuple[str, ...]) -> subprocess.Popen:
    """Starts a process that has imported these modules, once for each process of the tests."""
    pipe = subprocess.PIPE
    command = [sys.executable, __file__, *imports]
    server = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.communicate)  # it ends with its input
    return server


def _serve(imports: Sequence[str]) -> None:
    """Runs each request of stdin, a line of JSON, in a child, and prints its exit status."""
    sys.path[0] = str(ROOT)
    for name in imports:
        __import__(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(arguments: list[str], env: dict[str, str], streams: list[str]) -> None:
    """Turns this child of the server into the command; ends as the command does."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _serve(sys.argv[1:])
