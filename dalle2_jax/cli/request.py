"""Flags -> Request -> files: what `dalle2 generate`, `dalle2 edit` and sample.py have in common.

The modes know nothing of flags: here the flags become a `pipelines.request.Request`, and `output`
writes what `pipelines.requests.run` generates for it. Modules that load jax are imported late, so
that mistakes in the flags are reported, and Ctrl-C works, at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from dalle2_jax.cli import commands, generate_flags, sampling_flags
from dalle2_jax.errors import UserError

if TYPE_CHECKING:
    from dalle2_jax.pipelines.request import Request

GENERATE = "generate"
# Flags whose value is a field of a Request as it stands -> that field. `sampling_flags` and those
# that name files are read by `_fields`.
_FIELDS = {
    "n": "n",
    "seed": "seed",
    "prior": "prior",
    "size": "size",
    "best_of": "best_of",
    "batch_size": "batch_size",
    "feather": "feather",
    "frames": "frames",
    "eta": "eta",
    "theta": "theta",
    "old_prompt": "old_prompt",
    "x_t": "x_T",
    "left": "left",
    "right": "right",
    "up": "up",
    "down": "down",
}
# Flags that are no field -> the field that the same modes take.
_LIKE_FIELD = {"preview_mask": "feather"}


def main(mode: str | None, modes: Sequence[str]) -> int:
    """Generates or edits by the flags; returns the exit status.

    Args:
        mode: the mode; None: not given, then it is "generate", or that of the file of --like.
        modes: those that the command has.
    """
    sampling_flags.read()  # its mistakes are reported first
    _check_files()
    like = generate_flags.LIKE.value
    if like is None:
        _check_flags(mode or GENERATE)
    from dalle2_jax.cli import output
    from dalle2_jax.imaging import files
    from dalle2_jax.pipelines.dalle2 import DALLE2
    from dalle2_jax.pipelines.metadata import check_weights
    from dalle2_jax.pipelines.request import Request
    from dalle2_jax.storage import paths

    commands.keep_compiled_programs()
    out, only, metadata = paths.to_path(generate_flags.OUT.value), None, {}
    if like is None:
        request = Request(**_fields(mode or GENERATE, out, only_present=False))
    else:
        metadata = files.read_metadata(like)
        request, only = _request_like(like, metadata, mode, modes, out)
    # Before the model is loaded: a folder that cannot be written to is reported at once.
    out = paths.prepare_folder(generate_flags.OUT.value)
    if "preview_mask" in flags.FLAGS and flags.FLAGS.preview_mask:
        print(output.write_mask_preview(request, out))
        return 0
    weights = generate_flags.WEIGHTS
    name = metadata.get("weights", weights.value) if not weights.present else weights.value
    # Only the stages that reach the size are loaded.
    model = DALLE2.from_pretrained(name, size=request.size)
    if like is not None:
        with _errors_name_like():
            check_weights(metadata, model)
    print(output.write(model, request, out, only))
    return 0


def _request_like(
    like: str, metadata: dict[str, Any], mode: str | None, modes: Sequence[str], out: Path
) -> tuple[Request, tuple[int, int] | None]:
    """Returns the request of the file of --like, changed by the flags, and which image it is."""
    from dalle2_jax.pipelines.metadata import check_format, from_metadata

    with _errors_name_like():
        check_format(metadata)
        mode_of_file = metadata.get("mode", GENERATE)
        if mode_of_file not in modes:
            command = "generate" if mode_of_file == GENERATE else "edit"
            raise UserError(
                f"the image is one of mode={mode_of_file}: repeat it by dalle2 {command}"
            )
        if mode not in (None, mode_of_file):
            raise UserError(f"the image is one of mode={mode_of_file}: leave out --mode={mode}")
    _check_flags(mode_of_file)
    overrides = _fields(mode_of_file, out, only_present=True)
    with _errors_name_like():
        return from_metadata(metadata, Path(like).parent, **overrides)


@contextmanager
def _errors_name_like() -> Iterator[None]:
    """Puts the flag --like before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--like={generate_flags.LIKE.value}: {error}") from error


def _check_files() -> None:
    """Raises UserError for a flag of an input file that is empty."""
    for name in ("image", "mask"):
        if name in flags.FLAGS:
            value = flags.FLAGS[name].value
            if "" in (value if isinstance(value, list) else [value]):
                raise UserError(f"--{name}= names no file")


def _check_flags(mode: str) -> None:
    """Raises UserError for flags that the mode does not take, before anything is loaded."""
    from dalle2_jax.pipelines.modes import MODES_OF, takes

    if generate_flags.LIKE.value is None and mode == GENERATE:
        if "image" in flags.FLAGS and flags.FLAGS.image:
            raise UserError(f"--image={flags.FLAGS.image[0]}: say with --mode what to do with it")
        if not (generate_flags.PROMPT.value or generate_flags.PROMPTS_FILE.value):
            raise UserError('nothing to generate: give --prompt "..." or --prompts_file FILE')
    for name in flags.FLAGS:
        field = {**_FIELDS, **_LIKE_FIELD}.get(name, name)
        flag = flags.FLAGS[name]
        # A flag at its default is let pass: scripts may give all flags to all modes.
        if flag.present and flag.value != flag.default and not takes(mode, field):
            modes = " or ".join(MODES_OF[field])
            raise UserError(f"--{name} goes with --mode={modes}, not {mode}")


def _fields(mode: str, out: Path, only_present: bool) -> dict[str, Any]:
    """Returns the fields of a Request that the flags set.

    Args:
        mode: fields that it does not take are left out.
        out: the folder to write to; inputs are named relative to it.
        only_present: leave out the defaults of flags that are not on the command line.
    """
    from dalle2_jax.cli import output
    from dalle2_jax.pipelines.modes import takes
    from dalle2_jax.pipelines.request import InputImage, InputMask
    from dalle2_jax.sampling.overrides import SamplingOptions

    fields: dict[str, Any] = {"mode": mode}
    for name, field in _FIELDS.items():
        if name not in flags.FLAGS or not takes(mode, field):
            continue
        if flags.FLAGS[name].present or not only_present:
            fields[field] = flags.FLAGS[name].value
    if prompts := generate_flags.read_prompts():
        fields["prompts"] = tuple(prompts)
    if "image" in flags.FLAGS and flags.FLAGS.image:
        fields["images"] = tuple(
            InputImage.open(path, output.name_in(path, out)) for path in flags.FLAGS.image
        )
    if "mask" in flags.FLAGS and flags.FLAGS.mask is not None:
        path = flags.FLAGS.mask
        fields["mask"] = InputMask.open(path, output.name_in(path, out))
    options = SamplingOptions(**sampling_flags.read())
    if options != SamplingOptions() or not only_present:
        fields["options"] = options
    return fields
