"""The documents cannot rot in silence: their scripts parse, their settings and links exist."""

import re
import subprocess
from pathlib import Path

import pytest

from dalle2_jax import build
from dalle2_jax.cli import config_flag

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    name: (DOCS / name).read_text(encoding="utf-8")
    for name in ("pictures.md", "sampling.md", "tpu.md", "upsampling.md", "weights.md")
}
BLOCKS = [
    block
    for text in PAGES.values()
    for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind in ("", "bash")])
def test_shell_commands_parse(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_settings_exist():
    config = build.read_config(f"{DOCS.parent}/configs/decoder.py:tiny")
    found = re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)*)", "".join(PAGES.values()))
    named = set(found) - {"json"}
    assert {"workdir", "data.path", "clip_from"} - named == {"workdir"}
    config_flag.check_overrides([f"--config.{name}=" for name in named], config)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    headings = re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (DOCS / target).exists(), target
