"""The table of docs/tpu.md: every network on every slice, by the TPU compiler.

python benchmarks/tpu_table.py [--only=decoder] [--again]    compiles what is not there yet
python benchmarks/tpu_table.py --write                        puts the table into docs/tpu.md

A row is the command that it shows, with --json; its answer is kept in docs/tpu_rows.json, so that
what was interrupted goes on. A compile takes from one to twenty minutes on a core.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from dalle2_jax.aot.chips import CHIPS

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "docs" / "tpu_rows.json"
PAGE = ROOT / "docs" / "tpu.md"
METHODS = ("optimal", "roofline", "cycles")
BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"

# A chip's HBM in GiB, as the vendor counts it, decides how many examples it takes.
SLICES = {
    "v5e:8x8": 16,
    "v5e:16x16": 16,
    "v5e:2x4": 16,
    "v4:2x2x1": 32,
    "v5p:4x4x4": 95,
    "v6e:8x8": 32,
    "v6e:16x16": 32,
}
# stage:variant -> (examples a chip of 16 GiB, parameters in 10**9); the decoder's variants are one
TRAINED = {
    "decoder:paper": (8, 3.6),
    "prior:paper": (64, 1.2),
    "ar_prior:paper": (31, 0.8),
    "clip:paper": (64, 1.0),
    "upsampler_256:paper": (16, 0.7),
    "upsampler_1024:paper": (8, 0.3),
    "upsampler_256:tpu": (16, 1.1),
    "upsampler_1024:tpu": (8, 0.5),
    "prior:tpu": (64, 1.2),
    "clip:tpu": (64, 1.0),
}
# fine-tuned with the batch of their configs
FINE_TUNED = ("decoder:karlo", "prior:karlo", "upsampler_256:karlo")
# with all of the compiler's search, ten times as long: what it tells beyond the table
SEARCHED = ("decoder:paper", "prior:paper", "clip:paper")
SAMPLED = ("v5e:1x1", "v5e:2x4", "v6e:1x1")


def chips(topology: str) -> int:
    count = 1
    for size in topology.partition(":")[2].split("x"):
        count *= int(size)
    return count


def rows(name: str, gib: int, chips: int) -> int:
    """Examples a chip, a power of two: in proportion to the memory that float32 weights, Adam and
    EMA (16 bytes a parameter) leave. Of SAM the weights count that lie whole on every chip."""
    most, billions = TRAINED[name]
    if name.startswith("clip"):
        return most if gib == 16 else 2 * most  # replicas of 64
    room = gib - 16 * billions / chips
    return 2 ** int(math.log2(max(most * room / 14, 1)))


def copies(name: str, chips: int) -> int:
    """Groups of chips that hold all weights each. A convolution's slices fill no tiles where its
    512 channels and fewer are cut in 256, or upsampler_256's 320 in 64; ar_prior's 1664 are no
    multiple of 256."""
    if not name.startswith(("decoder", "upsampler", "ar_prior")):
        return 1
    groups = max(chips // 64, 1)
    return 2 if name == "upsampler_256:paper" and chips == 64 else groups


def commands() -> list[str]:
    """Every row's command, those that matter most first."""
    found, searched = [], []
    for topology, gib in SLICES.items():
        for name in TRAINED:
            stage, variant = name.split(":")
            batch = rows(name, gib, chips(topology)) * chips(topology)
            groups = copies(name, chips(topology))
            grouped = f" --config.mesh.data={groups}" if groups > 1 else ""
            found.append(
                f"python train.py --config=configs/{stage}.py:{variant} --topology={topology} "
                f"--config.batch_size={batch}{grouped}"
            )
            if name in SEARCHED and topology == next(iter(SLICES)):
                searched.append(f"{found[-1]} --thorough")
    sampled = [
        f"python sample.py --weights=configs/{variant} --topology={topology} "
        f"--batch_size={chips(topology)}"
        for topology in SAMPLED
        for variant in ("paper", "tpu", "karlo")
    ]
    tuned = [
        f"python train.py --config=configs/{name.replace(':', '.py:')} --topology=v5e:4x4"
        for name in FINE_TUNED
    ]
    natural = len(TRAINED)  # all networks on the first slice, then sampling, then the rest
    return found[:natural] + sampled + tuned + found[natural:] + searched


def run(command: str) -> dict:
    """The row's report; {"error": its one line} where it does not fit."""
    words = [sys.executable, *command.split()[1:], "--json"]
    since = time.time()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        row = json.loads(done.stdout.strip().splitlines()[-1])
    elif done.returncode == 3:
        row = {"error": done.stderr.strip().splitlines()[-1]}
    else:
        raise SystemExit(f"{command}: {done.stderr.strip().splitlines()[-1:]}")
    return row | {"compiled_in": round(time.time() - since)}


def load() -> dict[str, dict]:
    """The rows that there are, in their order; those of other commands are forgotten."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    return {command: rows[command] for command in commands() if command in rows}


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| network | slice | batch | GiB a chip | FLOPs compiled / analytic | padding | "
        "collectives, GB (of ideal) | ms a step: compiler / roofline | MFU | images/s | "
        "days, for million images |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for command, row in rows.items():
        if row.get("thorough"):
            continue
        words = dict(w.lstrip("-").split("=") for w in command.split() if "=" in w)
        name = _name(words)
        if "error" in row:
            told = row["error"].partition(":")[2].strip()
            lines.append(f"| {name} | {words['topology']} | does not fit: {told} | | | | | | | | |")
            continue
        lines.append(_line(name, row))
    lines += [
        "",
        "With `--thorough`:",
        "",
        "| network | slice | batch | GiB a chip | asynchronous, of the collectives' bytes | "
        "ms a step: compiler / roofline / cycles | compiled in, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for command, row in rows.items():
        if row.get("thorough"):
            words = dict(w.lstrip("-").split("=") for w in command.split() if "=" in w)
            times = " / ".join(f"{1e3 * (row['seconds'][m] or 0):.0f}" for m in METHODS)
            lines.append(
                f"| {_name(words)} | {row['topology']} | {row['batch_size']} | "
                f"{row['memory']['total'] / 2**30:.1f} of {row['hbm'] / 2**30:.4g} | "
                f"{100 * row['async_share']:.0f} % | {times} | {row['compiled_in']} |"
            )
    lines += ["", "<details><summary>The rows' commands, in their order</summary>", "", "```"]
    lines += [*rows, "```", "", "</details>"]
    return "\n".join(lines)


def _name(words: dict[str, str]) -> str:
    """Returns the name of a row: `decoder:paper`, or `generating, paper`."""
    name = Path(words.get("config", "generating").replace(".py", "")).name
    return name + (f", {Path(words['weights']).name}" if "weights" in words else "")


def _line(name: str, row: dict) -> str:
    def each(values: dict, scale: float, digits: int) -> str:
        order = ("optimal", "roofline")
        return " / ".join(
            f"{scale * values[k]:.{digits}f}" if values.get(k) else "-" for k in order
        )

    sent = sum(kind["bytes"] for kind in row["collectives"].values())
    ideal = row["ideal_collective_bytes"]
    ratio = f" ({sent / ideal:.2f})" if ideal else ""
    padding = f"{100 * row['padding']:.1f} %" if row.get("padding") is not None else ""
    best = "optimal" if row["seconds"]["optimal"] else "roofline"
    rate = row["images_per_second"][best]
    days = bound = ""
    if row["num_steps"]:  # when generating, each stage has its own bound
        days = f"{row['days'][best]:.1f}, {row['num_steps'] * row['batch_size'] / 1e6:,.0f}"
        chip = CHIPS[row["topology"].partition(":")[0]]
        within = max(row["compiled_flops"] / chip.flops, row["hbm_traffic"] / chip.bandwidth)
        bound = " (links)" if row["seconds"]["roofline"] > 1.001 * within else ""
    return (
        f"| {name} | {row['topology']} | {row['batch_size']} | "
        f"{row['memory']['total'] / 2**30:.1f} of {row['hbm'] / 2**30:.4g} | "
        f"{row['flops_ratio']:.3f} | {padding} | {sent / 1e9:.2f}{ratio} | "
        f"{each(row['seconds'], 1e3, 0)}{bound} | {each(row['mfu'], 100, 0)} % | "
        f"{rate:{',.0f' if rate >= 100 else '.3g'}} | {days} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose command holds this text")
    parser.add_argument("--again", action="store_true", help="compile rows that are there as well")
    parser.add_argument("--write", action="store_true", help="write the table, compile nothing")
    flags = parser.parse_args()
    if not flags.write:
        for command in commands():
            rows = load()
            if flags.only in command and (flags.again or command not in rows):
                print(command, flush=True)
                row = run(command)
                rows = load() | {command: row}  # another process may have added some meanwhile
                ROWS.write_text(json.dumps(rows, indent=1) + "\n")
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(load())}\n{END}{after}")


if __name__ == "__main__":
    main()
