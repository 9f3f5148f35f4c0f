"""Karlo on this CPU beside diffusers: the same weights, float32, each library in turn.

python benchmarks/karlo.py [--size=real] [--rows=decoder --rows=prior ...] [--compile]

Needs Linux and the extra parity (make test-parity installs it), and at real size 14 GB of memory
and 6 GB of disk. Weights are random, saved by the originals and imported. Ratios are the median of
rounds, ours over theirs: below 1 ours is faster. `pipeline` is always the small one, a caption to a
picture with the default numbers of steps. torch has its U-Nets in channels_last; --compile adds
torch.compile, which needs a C++ compiler. The peak is that of a process while it computes, its
weights included.
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
flags.DEFINE_multi_enum("rows", ROWS, ROWS, "what to measure; may be given several times")
flags.DEFINE_enum("size", "real", ["real", "small"], "of the single networks")
flags.DEFINE_integer("rounds", 5, "measurements of each way, in turn")
flags.DEFINE_integer("threads", 2, "cores for each library")
flags.DEFINE_bool("compile", False, "torch.compile as a third way")
flags.DEFINE_string("out", None, "a JSON file for all that was measured")

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red apple on a table"
Ways = dict[str, Callable[[], Any]]


def main(argv: list[str]) -> None:
    del argv
    titles = ["", "ours s", "diffusers s", "CPU", "wall", "CPU compiled", "wall compiled"]
    titles += ["peak MB: ours", "diffusers", "compiled"]
    show(titles)
    show(["-"] * len(titles))
    measured = {name: metadata.version(name) for name in ("jax", "torch", "diffusers")}
    measured |= {"machine": platform.machine(), "cores": os.cpu_count(), "threads": FLAGS.threads}
    measured |= {"size": FLAGS.size, "rows": {}}
    for row in FLAGS.rows:
        measured["rows"][row] = found = measure_row(row)
        show(told(row, found))
        print(f"{row}: load before and after {found['load']}", file=sys.stderr)
        if FLAGS.out:
            Path(FLAGS.out).write_text(json.dumps(measured, indent=1))


def show(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def measure_row(row: str) -> dict[str, Any]:
    """{"load", "samples": {way: [{"cpu", "wall" seconds, "peak" MB}]}, "ratios": {way: {...}}}"""
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = Path(made) / "theirs"
        small = FLAGS.size == "small" or row == "pipeline"
        with _process(save, folder, row, small) as connection:
            connection.recv()
        sides = [
            stack.enter_context(_process(measure, side, folder, row, FLAGS.threads, FLAGS.compile))
            for side in (our_ways, their_ways)
        ]
        ways = {way: side for side in sides for way in side.recv()}
        samples: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        before = os.getloadavg()
        for _ in range(FLAGS.rounds):
            for way, side in ways.items():
                side.send(way)
                samples[way].append(side.recv())
    ratios = {
        way: {
            kind: statistics.median(
                a[kind] / b[kind] for a, b in zip(samples["ours"], others, strict=True)
            )
            for kind in ("cpu", "wall")
        }
        for way, others in samples.items()
    }
    return {"load": [before, os.getloadavg()], "samples": samples, "ratios": ratios}


def told(row: str, found: dict[str, Any]) -> list[str]:
    samples, ratios = found["samples"], found["ratios"]
    cells = [row]
    for way in ("ours", "diffusers"):
        cells.append(f"{statistics.median(x['wall'] for x in samples[way]):.2f}")
    for way in ("diffusers", "compiled"):
        for kind in ("cpu", "wall"):
            cells.append(f"{ratios[way][kind]:.2f}" if way in ratios else "-")
    for way in ("ours", "diffusers", "compiled"):
        peaks = [x["peak"] for x in samples.get(way, [])]
        cells.append(f"{max(peaks):.0f}" if peaks else "-")
    return cells


@contextlib.contextmanager
def _process(function: Callable, *args: Any) -> Iterator[Any]:
    """A connection to a new process that runs function(connection, *args)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=function, args=(there, *args))
    process.start()
    there.close()  # so that the end of the process is the end of what it says
    try:
        yield here
    finally:
        here.close()
        process.join()


def save(connection: Any, folder: Path, row: str, small: bool) -> None:
    """Writes what is compared."""
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
        given = originals.inputs(row, parts, originals.BATCHES.get(row, 2))
        np.savez(folder / "inputs.npz", **given)
    connection.send("done")


def measure(
    connection: Any, side: Callable[..., Ways], folder: Path, row: str, threads: int, compiled: bool
) -> None:
    """Says which ways there are; then measures the one that is asked for, until nobody asks."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA counts these
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]
    ways = side(folder, row, threads, compiled)
    for name, way in list(ways.items()):
        ctypes.CDLL(None).malloc_trim(0)  # what loading has left behind is no part of the peak
        try:
            way()
        except Exception as error:
            if name != "compiled":
                raise
            del ways[name]
            print(f"{row}: torch.compile does not work here: {error}", file=sys.stderr)
    connection.send(list(ways))
    with contextlib.suppress(EOFError):
        while True:
            way = ways[connection.recv()]
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            found = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            status = Path("/proc/self/status").read_text()
            peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            connection.send(found | {"peak": int(peak.split()[1]) / 1024})


def our_ways(folder: Path, row: str, threads: int, compiled: bool) -> Ways:
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
    given = dict(np.load(folder / "inputs.npz"))
    run = imported.jitted(row, network)
    return {"ours": lambda: jax.block_until_ready(run(params, given))}


def their_ways(folder: Path, row: str, threads: int, compiled: bool) -> Ways:
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
        given = {k: torch.tensor(x) for k, x in np.load(folder / "inputs.npz").items()}

    def run(parts: Any) -> Any:
        if row != "pipeline":
            return originals.run(row, parts, given)
        whole = originals.PIPELINE(**parts, **others)
        whole.set_progress_bar_config(disable=True)
        return whole(PROMPT)

    ways = {"diffusers": networks}
    if compiled:
        ways["compiled"] = {name: torch.compile(module) for name, module in networks.items()}
    return {name: torch.inference_mode()(lambda x=x: run(x)) for name, x in ways.items()}


if __name__ == "__main__":
    app.run(main)
