"""The emoji sets: which npm packages they come from, and their icons as SVG documents.

All are Iconify's: `icons.json` holds the drawings by name, `chars.json` maps code points to names
where a set has them. Fluent's glossy variant and Noto's first generation have none, but share their
names with a sibling.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from dalle2_jax.data.emoji import npm

PACKAGES: dict[str, npm.Package] = {
    "noto": npm.Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "noto-v1": npm.Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "twemoji": npm.Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent-emoji": npm.Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "fluent-emoji-flat": npm.Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fluent-emoji-high-contrast": npm.Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "emojione": npm.Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "emojione-monotone": npm.Package(
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
    ),
    "fxemoji": npm.Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
    "streamline-emojis": npm.Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    ),
    # The rest are share-alike: to evaluate on, never to train from (words.EVALUATION_STYLES).
    "openmoji": npm.Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
    "emojione-v1": npm.Package(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
    ),
}
# A set without code points of its own borrows those of the set it shares icon names with.
_CODE_POINTS_OF = {"fluent-emoji": "fluent-emoji-flat", "noto-v1": "noto"}


@dataclasses.dataclass(frozen=True)
class IconSet:
    """One set of icons.

    Attributes:
      icons: Iconify's `icons.json`: drawings, aliases and the size that all share.
      code_points: code point in lower-case hexadecimal -> icon name; empty if the set has none.
      license: SPDX identifier.
      pin: `package@version`.
    """

    icons: Mapping[str, Any]
    code_points: Mapping[str, str]
    license: str
    pin: str

    @property
    def names(self) -> list[str]:
        """Every icon name, aliases among them."""
        return [*self.icons["icons"], *self.icons.get("aliases", {})]

    def aliases_of(self, name: str) -> list[str]:
        """Returns other names of the same drawing; not those of its mirror images."""
        return [
            alias
            for alias, target in self.icons.get("aliases", {}).items()
            if target == {"parent": name}
        ]

    def by_code_point(self, code: str) -> str | None:
        """Returns the icon name of an emoji's code points such as `1f468-200d-1f33e`."""
        return self.code_points.get(code) or self.code_points.get(code.replace("-fe0f", ""))

    def svg(self, name: str) -> str | None:
        """Returns the icon as a square document with the drawing centred; None if it is missing."""
        alias = self.icons.get("aliases", {}).get(name)
        icon = self.icons["icons"].get(alias["parent"] if alias else name)
        if icon is None:
            return None
        # Iconify's defaults: an icon's own size, else the set's, else 16.
        width, height = (icon.get(k, self.icons.get(k, 16)) for k in ("width", "height"))
        left, top = (icon.get(k, self.icons.get(k, 0)) for k in ("left", "top"))
        # An alias may be the mirror image of its parent ("left", "right"): the body is flipped
        # about the middle of its own box.
        body = icon["body"]
        if alias and alias.get("hFlip"):
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        if alias and alias.get("vFlip"):
            body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
        # Flags and some buttons are wider than tall; the shorter side gets equal margins.
        side = max(width, height)
        box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{side}" height="{side}" viewBox="{box}">{body}</svg>'
        )


def load_sets(cache: pathlib.Path | None = None) -> dict[str, IconSet]:
    """Fetches every set: style -> IconSet, in the order of PACKAGES.

    Raises:
      UserError: a package cannot be fetched (see `npm.fetch`).
    """
    tarballs = {style: npm.fetch(package, cache) for style, package in PACKAGES.items()}
    return {
        style: IconSet(
            icons=npm.read_json(tarball, "icons.json"),
            code_points=npm.read_json(tarballs[_CODE_POINTS_OF.get(style, style)], "chars.json"),
            license=npm.read_json(tarball, "info.json")["license"]["spdx"],
            pin=PACKAGES[style].pin,
        )
        for style, tarball in tarballs.items()
    }
