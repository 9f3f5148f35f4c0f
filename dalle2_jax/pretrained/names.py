"""One table a source: its tensors' names and layouts beside ours, read in both directions.

A table is a list of rules (their name, our name, layout). Names hold places in braces:

    {i}     a number, the same on both sides;
    {~i}    on their side alone: counted from the end, so that the last is our 0;
    {l}     on their side alone: the layers of a scanned transformer, which we stack on axis 0.

Where several of our names stand, their tensor is cut into so many parts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dalle2_jax.errors import UserError

Read = Callable[[str], np.ndarray]
"""A tensor by its name, read when it is asked for."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A conversion of one tensor of theirs into ours, and back."""

    ours: Callable[[np.ndarray], Any]
    theirs: Callable[[Any], np.ndarray]


def axes(*order: int) -> Layout:
    """The axes of theirs in our order."""
    back = [order.index(i) for i in range(len(order))]
    return Layout(lambda x: x.transpose(order), lambda x: x.transpose(back))


def beside(leading: int) -> Layout:
    """Axes of length 1 in front of ours."""
    return Layout(
        lambda x: x.reshape((1,) * leading + x.shape), lambda x: x.reshape(x.shape[leading:])
    )


def without(leading: int) -> Layout:
    """Axes of length 1 in front of theirs."""
    found = beside(leading)
    return Layout(found.theirs, found.ours)


def then(first: Layout, second: Layout) -> Layout:
    """`second` of what `first` gives."""
    return Layout(lambda x: second.ours(first.ours(x)), lambda x: first.theirs(second.theirs(x)))


def feature_major(count: int) -> Layout:
    """Returns the layout of rows [features count, ...] whose neighbours are one feature's tokens.

    In ours a token's features are neighbours.
    """

    def swap(x: np.ndarray, n: int) -> np.ndarray:
        return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    return Layout(lambda x: swap(x, count), lambda x: swap(x, len(x) // count))


def head_major(count: int, channels: int) -> Layout:
    """Returns the layout of rows [heads count channels, ...] whose neighbours are a head's parts.

    The `count` parts are q, k and v. In ours the heads of a part are neighbours.
    """

    def swap(x: np.ndarray, n: int) -> np.ndarray:
        return x.reshape(-1, n, channels, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    return Layout(lambda x: swap(x, count), lambda x: swap(x, len(x) // (count * channels)))


def pointwise(spatial: int) -> Layout:
    """Returns the layout of a convolution's kernel [out, in, 1, ...] that is [in, out] in ours.

    A convolution of 1 x 1 is a matrix product, which is what our networks call it.
    """
    ones = (1,) * spatial
    return Layout(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T.reshape(x.T.shape + ones))


SAME = Layout(lambda x: x, lambda x: x)
MATRIX = axes(1, 0)  # [out, in] -> [in, out]
CONV = axes(2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]

Rule = tuple[str, str | Sequence[str], Layout]
Module = Mapping[str, tuple[str, Layout]]
"""{their tensor of a module: (ours, layout)}"""

DENSE: Module = {"weight": ("kernel", MATRIX), "bias": ("bias", SAME)}
CONVOLUTION: Module = {"weight": ("kernel", CONV), "bias": ("bias", SAME)}
NORM: Module = {"weight": ("norm.scale", SAME), "bias": ("norm.bias", SAME)}
SKIP: Module = {"weight": ("kernel", pointwise(2)), "bias": ("bias", SAME)}
POINTWISE: Module = {"weight": ("kernel", pointwise(1)), "bias": ("bias", SAME)}


def module(theirs: str, ours: str, kind: Module) -> list[Rule]:
    """Returns the rules of one module's tensors."""
    return [(f"{theirs}.{a}", f"{ours}.{b}", layout) for a, (b, layout) in kind.items()]


def fused(theirs: str, ours: Sequence[str], kind: Module, order: Layout = SAME) -> list[Rule]:
    """Returns the rules of one module that is several of ours; `order` is that of its rows."""
    return [
        (f"{theirs}.{a}", [f"{part}.{b}" for part in ours], then(order, layout))
        for a, (b, layout) in kind.items()
    ]


def within(theirs: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """Returns `rules` with a prefix before each name on either side."""
    return [
        (theirs + a, ours + b if isinstance(b, str) else [ours + part for part in b], layout)
        for a, b, layout in rules
    ]


_PLACE = re.compile(r"\{(~?)(\w+)\}")


def to_ours(rules: Sequence[Rule], names: Iterable[str], read: Read) -> Converted:
    """Plans a source's tensors as ours.

    Raises UserError where two rules speak of one tensor, or layers are missing.
    """
    # Two passes. The first sees names only and plans, so that a wrong model is refused before a
    # byte of its weights is read:
    #
    #     for each of their names:       rule = the only one whose pattern matches
    #         for each part of the rule: sources[our name][layer] = (their name, part, rule)
    #
    # The second, `tensor`, reads the tensors of one of our names when it is asked for, so that only
    # one is in memory at a time: it turns each, splits fused ones, and stacks layers.
    names = sorted(names)
    sources: dict[str, dict[int, tuple[str, int, Rule]]] = {}
    unknown = []
    for name in names:
        matches = [(rule, match) for rule in rules if (match := _pattern(rule[0]).fullmatch(name))]
        if len(matches) > 1:
            rule_names = [rule[0] for rule, _ in matches]
            raise UserError(f"{name} is named by {len(matches)} rules: {rule_names}")
        if not matches:
            unknown.append(name)
            continue
        rule, match = matches[0]
        places = {place: int(number) for place, number in match.groupdict().items()}
        for place, before in _from_the_end(rule[0]).items():
            # Their upsampling blocks count from the deepest level, ours from the highest.
            places[place] = _count(before.format(**places), names) - 1 - places[place]
        # Layers that one tensor of ours holds, stacked for `nn.scan`; 0 where none are stacked.
        layer = places.get(_stacked(rule) or "", 0)
        for part, ours in enumerate(_parts(rule)):
            layers = sources.setdefault(ours.format(**places), {})
            if layer in layers:
                raise UserError(f"{name} and {layers[layer][0]} are one tensor of ours")
            layers[layer] = name, part, rule
    for ours, layers in sources.items():
        if sorted(layers) != list(range(len(layers))):
            raise UserError(f"of {ours} there are the layers {sorted(layers)} alone")

    def tensor(ours: str) -> np.ndarray:
        pieces = []
        for _, (name, part, rule) in sorted(sources[ours].items()):
            tensor_read = read(name)
            try:
                whole = rule[2].ours(tensor_read)
                # Fused q, k and v are neighbours along the last axis, that of the outputs.
                parts = len(_parts(rule))
                pieces.append(np.split(whole, parts, axis=-1)[part] if parts > 1 else whole)
                fits = pieces[-1].shape == pieces[0].shape
            except (ValueError, IndexError):
                fits = False
            if not fits:
                raise UserError(
                    f"{name} is of another network: its shape {tensor_read.shape} is not what "
                    "stands there"
                )
        stacked = _stacked(next(iter(sources[ours].values()))[2])
        if not stacked:
            return np.asarray(pieces[0], order="C")
        # In C's order, which np.stack does not keep of turned matrices: else the file's writer
        # would copy the whole stage.
        whole = np.empty((len(pieces), *pieces[0].shape), pieces[0].dtype)
        return np.stack(pieces, out=whole)

    return Converted(list(sources), unknown, tensor)


@dataclasses.dataclass(frozen=True)
class Converted:
    """Our names, the names of theirs that no rule knows, and what makes a tensor of ours."""

    names: Sequence[str]
    unknown: Sequence[str]
    tensor: Read


def to_theirs(
    rules: Sequence[Rule], names: Iterable[str], read: Read
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (their name, tensor) of all tensors of ours; UserError if one has no place there."""
    # The rules read backwards: parts are fused, stacks taken apart, layouts turned back. The order
    # is that of the rules, so that tensors of one network come together and can be written at once.
    names = sorted(names)
    left = set(names)
    for rule in rules:
        theirs, _, layout = rule
        parts = _parts(rule)
        if not parts:
            continue
        for name in names:
            # The first part finds the others: a fused tensor has all of them or none.
            match = _pattern(parts[0]).fullmatch(name)
            if not match:
                continue
            places = {place: int(number) for place, number in match.groupdict().items()}
            used = [part.format(**places) for part in parts]
            left -= set(used)
            pieces = [np.asarray(read(part)) for part in used]
            whole = np.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0]
            for place in _from_the_end(theirs):
                before = parts[0].partition(f"{{{place}}}")[0].format(**places)
                places[place] = _count(before, names) - 1 - places[place]
            stacked = _stacked(rule)
            for layer, tensor in enumerate(whole if stacked else [whole]):
                layer_places = {**places, stacked: layer} if stacked else places
                yield (
                    _plain(theirs).format(**layer_places),
                    np.asarray(layout.theirs(tensor), order="C"),
                )
    if left:
        raise UserError(f"{len(left)} tensors have no place there: {', '.join(sorted(left)[:5])}")


def _parts(rule: Rule) -> Sequence[str]:
    return [rule[1]] if isinstance(rule[1], str) else rule[1]


def _plain(template: str) -> str:
    return template.replace("{~", "{")


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    # Six digits are more layers than any network has, and keep int() from hostile lengths.
    return re.compile(
        re.sub(r"\\\{(?:\\~|~)?(\w+)\\\}", r"(?P<\1>[0-9]{1,6})", re.escape(template))
    )


def _places(template: str) -> list[str]:
    return [place for _, place in _PLACE.findall(template)]


def _stacked(rule: Rule) -> str | None:
    """Returns the place that their name has and ours lacks: that of stacked layers, or None."""
    left = [p for p in _places(rule[0]) if _parts(rule) and p not in _places(_parts(rule)[0])]
    return left[0] if left else None


def _from_the_end(template: str) -> dict[str, str]:
    """Returns {place that is counted from the end, written {~place}: the name before it}."""
    found = [match for match in _PLACE.finditer(template) if match[1]]
    return {match[2]: _plain(template[: match.start()]) for match in found}


def _count(before: str, names: Iterable[str]) -> int:
    """Counts the numbers that follow `before` in names."""
    numbered = re.compile(re.escape(before) + r"(\d{1,6})")
    return 1 + max(int(match[1]) for name in names if (match := numbered.match(name)))
