"""docs/tpu.md cannot rot in silence: its scripts parse, its settings and its links exist."""

import re
import subprocess
from pathlib import Path

import pytest

from dalle2_jax import build

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "tpu.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind in ("", "bash")])
def test_shell_commands_parse(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_settings_exist():
    config = build.ConfigParser("config").parse(f"{DOCS.parent}/configs/decoder.py:tiny")
    named = set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)*)", TEXT)) - {"json"}
    assert {"workdir", "data.path", "clip_from"} - named == {"workdir"}
    build.check_overrides([f"--config.{name}=" for name in named], config)


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (DOCS / target).exists(), target
