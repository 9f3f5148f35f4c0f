"""Flags -> Request: what `dalle2 generate`, `dalle2 edit` and sample.py have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from dalle2_jax.cli import commands, generate_flags, sampling_flags
from dalle2_jax.errors import UserError

GENERATE = "generate"
# flag -> the field of a Request that it sets, where the names differ
_FIELDS = {"x_t": "x_T", "image": "images", "prompt": "prompts", "prompts_file": "prompts"}
_PLAIN = ("n", "seed", "prior", "size", "best_of", "batch_size", "feather", "frames", "eta")
_PLAIN += ("theta", "old_prompt", "x_t", "left", "right", "up", "down")


def main(mode: str) -> int:
    """Generates by the flags; `mode` is that of --mode, or "generate"."""
    sampling_flags.read()  # its mistakes are reported first
    check(mode)
    # Late, so that mistakes in the flags are reported, and Ctrl-C works, at once.
    from dalle2_jax.cli import output
    from dalle2_jax.imaging import files
    from dalle2_jax.pipelines.dalle2 import DALLE2
    from dalle2_jax.pipelines.metadata import check_weights, from_metadata
    from dalle2_jax.pipelines.request import Request
    from dalle2_jax.storage import paths

    commands.keep_compiled_programs()
    out = Path(generate_flags.OUT.value)
    like, only, metadata = generate_flags.LIKE.value, None, {}
    if like is None:
        request = Request(mode=mode, **_fields(out, mode, only_present=False))
    else:
        metadata = files.read_metadata(like)
        try:
            overrides = _fields(out, metadata.get("mode", GENERATE), only_present=True)
            request, only = from_metadata(metadata, Path(like).parent, **overrides)
        except UserError as error:
            raise UserError(f"--like={like}: {error}") from error
        if "n" in overrides or "prompts" in overrides:
            only = None
    out = paths.prepare_folder(generate_flags.OUT.value)
    if "preview_mask" in flags.FLAGS and flags.FLAGS.preview_mask:
        print(output.write_mask_preview(request, out))
        return 0
    weights = generate_flags.WEIGHTS
    name = metadata["weights"] if like and not weights.present else weights.value
    size = metadata.get("size") if like and request.size is None else request.size
    model = DALLE2.from_pretrained(name, size=size)
    if like is not None:
        try:
            check_weights(metadata, model)
        except UserError as error:
            raise UserError(f"--like={like}: {error}") from error
    print(output.write(model, request, out, only))
    return 0


def check(mode: str) -> None:
    """Raises UserError for flags that the mode does not take, before anything is loaded."""
    for name in ("image", "mask"):
        if name in flags.FLAGS:
            value = flags.FLAGS[name].value
            if "" in (value if isinstance(value, list) else [value]):
                raise UserError(f"--{name}= names no file")
    if generate_flags.LIKE.value is not None:
        return
    if mode == GENERATE and "image" in flags.FLAGS and flags.FLAGS.image:
        raise UserError(f"--image={flags.FLAGS.image[0]}: say with --mode what to do with it")
    if mode == GENERATE and not (generate_flags.PROMPT.value or generate_flags.PROMPTS_FILE.value):
        raise UserError('nothing to generate: give --prompt "..." or --prompts_file FILE')
    from dalle2_jax.pipelines.modes import MODES_OF

    for name in flags.FLAGS:
        modes = MODES_OF.get({"x_t": "x_T", "preview_mask": "feather"}.get(name, name))
        flag = flags.FLAGS[name]
        if modes and flag.present and flag.value != flag.default and mode not in modes:
            raise UserError(f"--{name} goes with --mode={' or '.join(modes)}, not {mode}")


def _fields(out: Path, mode: str, only_present: bool) -> dict[str, Any]:
    """Returns the fields of a Request that the flags set; `only_present`: those on the line."""
    from dalle2_jax.cli import output
    from dalle2_jax.pipelines.modes import MODES_OF
    from dalle2_jax.pipelines.request import InputMask
    from dalle2_jax.sampling.overrides import SamplingOptions

    fields: dict[str, Any] = {}
    for name in _PLAIN:
        if name not in flags.FLAGS or (only_present and not flags.FLAGS[name].present):
            continue
        field = _FIELDS.get(name, name)
        if mode in MODES_OF.get(field, (mode,)):
            fields[field] = flags.FLAGS[name].value
    prompts = tuple(generate_flags.read_prompts())
    if prompts or not only_present:
        fields["prompts"] = prompts
    if "image" in flags.FLAGS and (flags.FLAGS.image or not only_present):
        fields["images"] = tuple(output.open_image(path, out) for path in flags.FLAGS.image)
    if "mask" in flags.FLAGS and flags.FLAGS.mask is not None:
        path = flags.FLAGS.mask
        fields["mask"] = InputMask.open(path, output.name_in(path, out))
    options = sampling_flags.read()
    if any(value is not None for value in options.values()) or not only_present:
        fields["options"] = SamplingOptions(**options)
    return fields
