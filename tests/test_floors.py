"""The floors of the house (docs/architecture.md), read from the imports by ast."""

import ast
import functools
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dalle2_jax"

# From the ground up. A room is a file or a folder directly inside the package. It imports from
# lower floors only; two rooms of one floor do not import each other. There are no exceptions.
FLOORS = (
    {"errors", "types", "version"},
    {"validation", "tokenizer", "stages"},
    {"storage", "parallel"},
    {"imaging"},
    {"diffusion", "nets", "data", "safety", "provenance"},
    {"sampling"},
    {"tasks"},
    {"train", "pretrained"},
    {"pipelines", "build", "prepare"},
    {"aot"},
    {"evals", "bench"},
    {"app"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAX_ROOT_MODULES = 8

# Who may import what is heavy; torch never at the top of a module.
HEAVY = {
    "tensorflow": {"data", "train"},
    "tensorflow_datasets": {"data"},
    "clu": {"train"},
    "torch": set(),
    "diffusers": set(),
    "transformers": set(),
}
# Rooms that know nothing of jax: what they do runs in input pipelines and at the edges.
NO_JAX = {"data", "errors", "tokenizer", "validation", "version"}

ROOT_SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + ROOT_SCRIPTS + sorted((ROOT / "configs").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path, top_only=False):
    """Dotted names that a file imports: 'a.b.c' for both `import a.b.c` and `from a.b import c`."""
    tree = tree_of(path)
    names = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path):
    """{(room, dotted name)}; the package's own name alone counts as room ''."""
    ours = (name.split(".") for name in imports(path) if name.split(".")[0] == "dalle2_jax")
    return {(parts[1] if len(parts) > 1 else "", ".".join(parts)) for parts in ours}


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_down(path):
    room = room_of(path)
    if room == "__init__":
        return  # the door: it shows what a user holds
    assert room in FLOOR, f"{relative(path)}: no floor for {room!r}; see docs/architecture.md"
    for other, name in rooms_imported(path):
        assert other in FLOOR, f"{relative(path)} imports {name}, which is in no room"
        assert FLOOR[other] < FLOOR[room] or other == room, (
            f"{relative(path)} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[other]})"
        )


def test_the_root_holds_few_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_ROOT_MODULES


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_flags_are_defined_by_the_command_line_alone(path):
    if room_of(path) != "cli":
        assert not {name for name in imports(path) if name.startswith("absl.flags")}
        assert "config_flags" not in {name.rpartition(".")[2] for name in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_heavy_imports_stay_in_their_rooms(path):
    room = room_of(path)
    for name in imports(path, top_only=True):
        library = name.split(".")[0]
        assert room in HEAVY.get(library, {room}), f"{relative(path)} imports {library} at its top"
        if room in NO_JAX:
            assert library not in {"jax", "flax", "optax"}, f"{relative(path)} imports {library}"


def test_input_pipelines_need_no_jax():
    # TensorFlow itself imports jax where it finds it, so jax is hidden rather than looked for.
    modules = "dalle2_jax.data.pipeline, dalle2_jax.imaging.files, dalle2_jax.imaging.grids"
    code = f"import sys; sys.modules['jax'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_import_circles():
    graph = {}
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        graph[".".join(parts).removesuffix(".__init__")] = path
    known = set(graph)

    def targets(path):
        for name in imports(path, top_only=True):
            while name and name not in known:  # a name inside a module -> the module
                name = name.rpartition(".")[0]
            if name and name != "dalle2_jax":
                yield name

    edges = {module: set(targets(path)) - {module} for module, path in graph.items()}
    list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=relative)
def test_configs_are_data_only(path):
    for name in imports(path):
        assert name.split(".")[0] in {"__future__", "ml_collections", "configs"}, name


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES + TESTS}
    assert not {relative(p): n for p, n in lengths.items() if n > 600}
    assert statistics.median(lengths[path] for path in MODULES) < 150
    assert lengths[ROOT / "train.py"] < 80 and lengths[ROOT / "sample.py"] < 80


def test_no_wildcard_imports():
    for path in SOURCES + TESTS:
        assert not [name for name in imports(path) if name.endswith(".*")], relative(path)


PROBE = """
import importlib, runpy, sys
for target in sys.argv[1:]:
    if target.endswith(".py"):
        runpy.run_path(target, run_name="probe")
    else:
        importlib.import_module(target)
heavy = "tensorflow tensorflow_datasets torch clu transformers diffusers resvg_py".split()
print(*[name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize(
    "targets",
    [["dalle2_jax"], ["dalle2_jax.pipelines.dalle2", "sample.py"], ["dalle2_jax.build"]],
    ids=["package", "drawing", "build"],
)
def test_drawing_loads_neither_tensorflow_nor_torch(targets):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *targets], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
