"""Measures Karlo on this CPU beside diffusers: the same weights, float32, each library in turn.

python benchmarks/karlo.py [--size=real] [--rows=decoder --rows=prior ...] [--compile]

Needs Linux and the extra parity (make test-parity installs it), and at real size 14 GB of memory
and 6 GB of disk. Weights are random, saved by the originals and imported. Ratios are the median of
rounds, ours over theirs: below 1 ours is faster. `pipeline` is always the small one, from a caption
to an image with the default numbers of steps. torch has its U-Nets in channels_last; --compile adds
torch.compile, which needs a C++ compiler. The peak is that of a process while it computes, its
weights included.

Each library runs in a process of its own, which waits for the name of an implementation ("ours",
"diffusers", "compiled"), runs it once and sends what it measured. So the implementations take
turns, and what disturbs the machine disturbs all alike.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS
ROWS = ["decoder", "upsampler", "prior", "pipeline"]
flags.DEFINE_multi_enum("rows", ROWS, ROWS, "What to measure; may be repeated.")
flags.DEFINE_enum("size", "real", ["real", "small"], "Size of the single networks.")
flags.DEFINE_integer("rounds", 5, "Measurements of each implementation, in turn.")
flags.DEFINE_integer("threads", 2, "Cores for each library.")
flags.DEFINE_bool("compile", False, "Also measure torch.compile.")
flags.DEFINE_string("out", None, "A JSON file for all measurements.")

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red apple on a table"
Implementations = dict[str, Callable[[], Any]]
"""Name -> a function that runs the network or pipeline once."""


def main(argv: list[str]) -> None:
    del argv
    titles = ["", "ours s", "diffusers s", "CPU", "wall", "CPU compiled", "wall compiled"]
    titles += ["peak MB: ours", "diffusers", "compiled"]
    show(titles)
    show(["-"] * len(titles))
    results: dict[str, Any] = {
        **{name: metadata.version(name) for name in ("jax", "torch", "diffusers")},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": FLAGS.threads,
        "size": FLAGS.size,
        "rows": {},
    }
    for row in FLAGS.rows:
        result = measure_row(row)
        results["rows"][row] = result
        show(cells_of(row, result))
        print(f"{row}: load before and after {result['load']}", file=sys.stderr)
        if FLAGS.out:
            Path(FLAGS.out).write_text(json.dumps(results, indent=1))


def show(cells: list[str]) -> None:
    """Prints a line of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def measure_row(row: str) -> dict[str, Any]:
    """Measures one row of the table.

    Returns:
        {"load": [before, after], "samples": {name: [{"cpu": s, "wall": s, "peak": MB}, ...]},
        "ratios": {name: {"cpu", "wall"}}}; a ratio is the median of ours over the other's.
    """
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary) / "theirs"
        small = FLAGS.size == "small" or row == "pipeline"
        with _process(save, folder, row, small) as connection:
            connection.recv()
        sides = [
            stack.enter_context(_process(measure, side, folder, row, FLAGS.threads, FLAGS.compile))
            for side in (ours, theirs)
        ]
        connections = {name: side for side in sides for name in side.recv()}
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in connections}
        before = os.getloadavg()
        for _ in range(FLAGS.rounds):
            for name, connection in connections.items():
                connection.send(name)
                samples[name].append(connection.recv())
    ratios = {
        name: {
            kind: statistics.median(
                a[kind] / b[kind] for a, b in zip(samples["ours"], others, strict=True)
            )
            for kind in ("cpu", "wall")
        }
        for name, others in samples.items()
    }
    return {"load": [before, os.getloadavg()], "samples": samples, "ratios": ratios}


def cells_of(row: str, result: dict[str, Any]) -> list[str]:
    """Returns the cells of a row of the table."""
    samples, ratios = result["samples"], result["ratios"]
    cells = [row]
    for name in ("ours", "diffusers"):
        cells.append(f"{statistics.median(x['wall'] for x in samples[name]):.2f}")
    for name in ("diffusers", "compiled"):
        for kind in ("cpu", "wall"):
            cells.append(f"{ratios[name][kind]:.2f}" if name in ratios else "-")
    for name in ("ours", "diffusers", "compiled"):
        peaks = [x["peak"] for x in samples.get(name, [])]
        cells.append(f"{max(peaks):.0f}" if peaks else "-")
    return cells


@contextlib.contextmanager
def _process(function: Callable, *args: Any) -> Iterator[Any]:
    """Yields a connection to a new process that runs function(connection, *args)."""
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=function, args=(other_end, *args))
    process.start()
    other_end.close()  # so that reading ends when the process ends
    try:
        yield connection
    finally:
        connection.close()
        process.join()


def save(connection: Any, folder: Path, row: str, small: bool) -> None:
    """Saves the originals' random weights, their settings and the inputs of the network."""
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    import numpy as np
    import originals
    import small_unclip

    if small:
        pipeline = small_unclip.text_to_image(folder)
        settings = {name: getattr(x, "config", None) for name, x in pipeline.components.items()}
    else:
        originals.write_settings(folder, row)
        settings = {}
        for part in originals.STAGES[row]:
            module = originals.real(part)
            module.save_pretrained(folder / part)
            settings[part] = module.config
    if row != "pipeline":
        parts = {part: settings[part] for part in originals.STAGES[row]}
        inputs = originals.inputs(row, parts, originals.BATCHES.get(row, 2))
        np.savez(folder / "inputs.npz", **inputs)
    connection.send("done")


def measure(
    connection: Any,
    side: Callable[..., Implementations],
    folder: Path,
    row: str,
    threads: int,
    compiled: bool,
) -> None:
    """Sends the names of the implementations of `side`, then measures each one that it is sent."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA counts these
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]
    implementations = side(folder, row, threads, compiled)
    for name, run in list(implementations.items()):
        ctypes.CDLL(None).malloc_trim(0)  # memory left over from loading is not part of the peak
        try:
            run()
        except Exception as error:
            if name != "compiled":
                raise
            del implementations[name]
            print(f"{row}: torch.compile does not work here: {error}", file=sys.stderr)
    connection.send(list(implementations))
    with contextlib.suppress(EOFError):
        while True:
            run = implementations[connection.recv()]
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            status = Path("/proc/self/status").read_text()
            peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            connection.send(seconds | {"peak": int(peak.split()[1]) / 1024})


def ours(folder: Path, row: str, threads: int, compiled: bool) -> Implementations:
    """Returns this project's network, or its pipeline, with the imported weights."""
    del threads, compiled
    import imported
    import jax
    import numpy as np

    if row == "pipeline":
        from dalle2_jax import DALLE2
        from dalle2_jax.pretrained.convert import import_model

        import_model(folder, folder.with_name("ours"))
        model = DALLE2.from_pretrained(str(folder.with_name("ours")))
        return {"ours": lambda: model.generate(PROMPT)}
    network, params, _ = imported.load(folder, row)
    if row == "upsampler":
        params = {"first": params["first"]}
    inputs = dict(np.load(folder / "inputs.npz"))
    run = imported.jitted(row, network)
    return {"ours": lambda: jax.block_until_ready(run(params, inputs))}


def theirs(folder: Path, row: str, threads: int, compiled: bool) -> Implementations:
    """Returns diffusers' network or pipeline and, with `compiled`, torch.compile of it."""
    import diffusers
    import numpy as np
    import originals
    import torch

    torch.set_num_threads(threads)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its workers would take memory

    def in_torch(module: Any) -> Any:
        is_unet = isinstance(module, diffusers.UNet2DModel | diffusers.UNet2DConditionModel)
        return module.to(memory_format=torch.channels_last) if is_unet else module

    names = [part for parts in originals.STAGES.values() for part in parts]
    if row != "pipeline":
        names = originals.STAGES[row][: 1 if row == "upsampler" else None]
    networks = {
        name: in_torch(originals.CLASSES[name].from_pretrained(folder / name).eval())
        for name in names
        if (folder / name).exists()
    }
    if row == "pipeline":
        others = originals.other_parts(folder)
    else:
        inputs = {k: torch.tensor(x) for k, x in np.load(folder / "inputs.npz").items()}

    def run(parts: Any) -> Any:
        if row != "pipeline":
            return originals.run(row, parts, inputs)
        pipeline = originals.PIPELINE(**parts, **others)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(PROMPT)

    variants = {"diffusers": networks}
    if compiled:
        variants["compiled"] = {name: torch.compile(module) for name, module in networks.items()}
    return {name: torch.inference_mode()(lambda x=x: run(x)) for name, x in variants.items()}


if __name__ == "__main__":
    app.run(main)
