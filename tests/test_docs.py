"""The documents stay true: their commands, settings, configs, links and anchors exist."""

import ast
import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dalle2_jax import build
from dalle2_jax.cli import config_flag
from dalle2_jax.cli.main import COMMANDS
from dalle2_jax.pipelines.modes import GENERATE, MARGINS, MODES_OF

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "dalle2_jax/weights/tiny/README.md",
        *sorted(DOCS.glob("*.md")),
    ]
}
OLD_NAMES = "docs/commands.md"  # its table names commands that are gone
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# Shell commands; diagrams are marked as `text`.
BLOCKS = [
    (page, block)
    for page, text in PAGES.items()
    for kind, block in FENCE.findall(text)
    if kind in ("", "bash")
]


def commands():
    """Yields (page, words) of each `dalle2 ...`, `train.py` and `sample.py` of a shell block."""
    for page, block in BLOCKS:
        for line in re.sub(r"\\\n", " ", block).splitlines():
            match = re.search(
                r"(?:^|[ \"'])(dalle2 |(?:python |bin/python )(train|sample)\.py)", line
            )
            if not match:
                continue
            start = match.start(1)
            text = re.split(r" [|>&]|&&|;|\)\"", line[start:])[0]
            words = shlex.split(re.sub(r"[\"']$", "", text) if text.count('"') % 2 else text, True)
            if words[0] != "dalle2":
                name = {"train.py": "train", "sample.py": "generate"}[words[1]]
                words = ["dalle2", name, *words[2:]]
            yield page, words


@functools.cache
def flags_of(module):
    """Returns the names of the flags that a module of the command line defines or imports."""
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.is_file():
        return frozenset()
    names = set(MARGINS) if module.endswith("edit_flags") else set()  # these in a comprehension
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dalle2_jax.cli"):
            for alias in node.names:
                names |= flags_of(f"{node.module}.{alias.name}") | flags_of(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function.startswith("DEFINE_") or function == "only_with_topology":
                names.add(node.args[0].value)
    return frozenset(names)


@pytest.mark.parametrize("block", [block for _, block in BLOCKS])
def test_shell_commands_parse(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_commands_exist_and_have_these_flags():
    seen = set()
    for page, words in commands():
        names = [name for name in COMMANDS if words[1 : 1 + len(name.split())] == name.split()]
        assert names, f"{page}: {' '.join(words)}"
        flags = flags_of(COMMANDS[names[0]].module)
        if names[0] in ("generate", "edit"):  # sample.py is both, and --topology
            flags |= flags_of(COMMANDS["edit"].module) | flags_of("dalle2_jax.cli.topology")
        for word in words:
            if not (match := re.match(r"--(?:no)?([a-z_]+)(?=$|[=.])", word)):
                continue
            flag = match[1]
            assert flag in flags or word.removeprefix("--") in flags, f"{page}: {names[0]} {word}"
        seen.add(names[0])
    assert {"generate", "edit", "train", "topology", "weights", "data emoji"} <= seen


def test_every_command_is_documented():
    pages = "\n".join(PAGES.values())
    for name in COMMANDS:
        assert f"dalle2 {name}" in pages, name


def test_every_flag_of_edit_is_documented():
    table = PAGES["docs/editing.md"]
    for flag in flags_of("dalle2_jax.cli.edit"):
        if MODES_OF.get(flag) == (GENERATE,):  # refused by every mode that edits
            continue
        assert f"`--{flag}`" in table or f"`--{flag} " in table, flag


def test_configs_and_their_settings_exist():
    named = 0
    for _, words in commands():
        arguments = [word for word in words if word.startswith("--config.")]
        for match in (re.match(r"--config=(configs/\w+\.py:[a-z0-9]+)$", w) for w in words):
            if match:
                config = build.read_config(f"{ROOT}/{match[1]}")
                config_flag.check_overrides(arguments, config)
                named += 1
    assert named > 20


def test_settings_named_in_the_text_exist():
    config = build.read_config(f"{ROOT}/configs/decoder.py:tiny")
    text = "".join(text for page, text in PAGES.items() if page.startswith("docs/"))
    names = set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)*)", text)) - {"json", "py"}
    assert {"data.path", "clip_from"} <= names
    config_flag.check_overrides([f"--config.{name}=" for name in names], config)


def test_files_named_in_the_text_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:dalle2_jax|tests|configs|benchmarks)/[\w/.]+\.\w+)`", text):
            assert (ROOT / name).exists() or "NAME" in name, f"{page}: {name}"
        for name in re.findall(r"`((?:train|data|nets|imaging|diffusion)/[\w/.]+)`", text):
            path = ROOT / "dalle2_jax" / name
            exists = path.exists() or path.with_suffix(".py").exists()
            assert exists or "NAME" in name or "emoji" in name, f"{page}: {name}"


def anchors_of(text):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_of(path.read_text(encoding="utf-8")), target


def test_old_commands_are_named_in_the_table_of_old_names_alone():
    for page, text in PAGES.items():
        if page != OLD_NAMES:
            assert "python -m dalle2_jax" not in text, page


def test_every_page_is_on_the_map():
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"({page.removeprefix('docs/')})" in PAGES["docs/README.md"], page


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
