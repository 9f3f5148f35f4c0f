"""Sampling one diffusion stage: the loop over its steps, and the program that takes them.

A stage is sampled in calls of a few steps, so that the host can report progress in between:

    numbers = tables of the schedule and solver, guidance scale ...      float32, padded
    state   = begin(x_T)
    while steps are left:
        state = _advance(program, params, cond, numbers, state, ...)     one jitted program

The settings are split in two. `program` is the sampler with every setting that is a number replaced
by a placeholder; it is static, so another solver or network compiles anew. The numbers themselves
are traced: another number of steps, guidance scale or eta reuses the compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np

from dalle2_jax.diffusion import analytic, guidance, inpainting, tables
from dalle2_jax.diffusion.inversion import DDIMInversion, invert_steps
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sample import State, advance, begin, denoiser_from, init_noise, take_step
from dalle2_jax.errors import UserError
from dalle2_jax.sampling.settings import Settings
from dalle2_jax.types import Array, Denoiser, Params, PyTree, Solver

Result = TypeVar("Result")


class StepsDone(NamedTuple):
    """Progress of a stage, reported before its first step and after each call."""

    done: int
    total: int
    x_0: Array | None = None
    """The prediction of x_0 [b, ...] as of now; None before the first step."""


# Generators, not callbacks: the caller decides when the next call starts, may stop between two, and
# the server can stream each event as it comes.
Events = Generator[StepsDone, None, Result]
"""Yields progress and returns the result."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def finish(events: Events[Result], progress: Progress | None = None) -> Result:
    """Runs `events` to its end and returns its result, reporting to `progress`."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        if progress is not None:
            # Dispatch is asynchronous: without waiting the bar would run ahead of the device.
            jax.block_until_ready(event.x_0)
            progress(event.done, event.total)


class Numbers(NamedTuple):
    """The arguments of a program: other values of them do not compile it anew."""

    solver: dict[str, Any]  # tables of the solver and of its schedule, padded to num_timesteps
    schedule: dict[str, Any]
    cfg_scale: np.float32
    cfg_rescale: np.float32
    guided_at: np.ndarray | None  # bool [num_timesteps]


# Frozen and compared by value: two samplers of equal settings share compiled programs.
@dataclasses.dataclass(frozen=True)
class StageSampler:
    """Samples x_0 [b, ...] from a stage's network.

    A subclass says how the network is called (`apply`) and what "no condition" is (`null`).
    Hashable, so that a jitted function takes it as a static argument.
    """

    SETTINGS: ClassVar = Settings
    ENTRY_OPTIONS: ClassVar[Mapping[str, int | None]] = {}
    """Keys of a stage's entry that the constructor takes, and defaults; None: it must be there."""
    needs_clip: ClassVar[bool] = False
    """Whether it works only with the CLIP that it was trained with."""

    network: Any  # the nn.Module of the stage: DiffusionPrior, Decoder or Upsampler
    process: Process
    settings: Settings
    x_0_error: tuple[float, ...] = dataclasses.field(default=(), kw_only=True)
    """The errors that `analytic.measure` found at the end of training; (): none were measured."""
    # Not compared: the number of steps is traced, so another value needs no other program.
    steps_a_call: int = dataclasses.field(default=5, kw_only=True, compare=False)
    """Steps between two reports of progress."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """Number of samples for one image."""
        return 1

    def __post_init__(self) -> None:
        # Checked here rather than in Settings, which know no process.
        limit = self.process.num_timesteps
        if self.settings.num_steps > limit:
            raise UserError(f"steps must be at most {limit}, not {self.settings.steps}")
        in_model = getattr(self.network, "learned_variance", False)
        in_diffusion = self.process.learned_variance
        if in_model != in_diffusion:
            raise UserError(
                f"learned_variance is {in_model} in model, {in_diffusion} in diffusion: "
                "set both alike"
            )
        self.make_solver()  # settings that exclude each other are reported before sampling

    def make_solver(self) -> Solver:
        """Returns the solver of the settings; raises UserError if they need what is not there."""
        settings, schedule = self.settings, self.settings.schedule(self.process)
        if settings.variance != "analytic" or settings.solver not in ("ddpm", "ddim"):
            return settings.make_solver(schedule)
        if self.process.learned_variance:
            raise UserError('variance="analytic" goes with no learned variance: take another')
        if len(self.x_0_error) != analytic.KNOTS:
            raise UserError(
                'variance="analytic" needs x_0_error, which a prior\'s training measures: see '
                'docs/sampling.md, or set variance="small" in config.json'
            )
        # DDPM's mean is DDIM's at eta = 1.
        eta = settings.eta if settings.solver == "ddim" else 1.0
        variances = analytic.variances(schedule, self.process.num_timesteps, self.x_0_error, eta)
        return settings.make_solver(schedule, variances)

    def apply(self, params: Params, x_t: Array, t: Array, cond: PyTree) -> Array:
        """x_t [b, ...], t int32 [b] of the training schedule -> the network's raw output."""
        raise NotImplementedError

    def null(self, cond: PyTree) -> PyTree:
        """Returns the condition that guidance moves away from."""
        raise NotImplementedError

    @property
    def evaluations(self) -> int:
        """Number of network evaluations for a batch; a guided one has twice the rows."""
        return self.make_solver().evaluations

    def parts(self, params: Params) -> list[tuple[Params, int]]:
        """Returns (parameters, number of steps they serve) in the order of sampling."""
        return [(params, self.settings.num_calls)]

    def program(self) -> StageSampler:
        """Returns this sampler without its numbers: the static argument of its program."""
        settings = self.settings
        # Equal for all samplers that may share a program. What stays in it decides what is traced:
        # the solver's class, clip, repeats, and whether there is guidance at all. At cfg_scale 1
        # the network runs on half the rows, so that is another program.
        #
        # A template of one step has tables of length 1; `with_tables` replaces them by the padded
        # ones, whose length is always num_timesteps.
        placeholders = dataclasses.replace(
            settings,
            steps=1,
            spacing="",
            eta=0.0,
            variance="small",
            cfg_scale=1.0 if settings.cfg_scale == 1 else 2.0,
            cfg_rescale=0.0,
            cfg_interval=None,
        )
        return dataclasses.replace(self, settings=placeholders, x_0_error=())

    def numbers(self) -> Numbers:
        """Returns the arguments of its program."""
        return _numbers(self)

    def sample(
        self,
        params: Params,
        cond: PyTree,
        keys: Array,
        shape: Sequence[int],
        noise: Array | None = None,
    ) -> Events[Array]:
        """Samples x_0 float32 [b, *shape], yielding progress.

        Args:
            params: the network's.
            cond: what `apply` takes, arrays [b, ...]. If part of an image is known,
                cond["known"] [b, h, w, 4] holds it: see `masks` and `inpainting.keeping`.
            keys: typed keys [b]; row i of the result depends on row i of the inputs alone.
            shape: the shape of one example.
            noise: [1 + steps, b, *shape] standard normal: x_T, then each step's noise in the order
                of sampling, in place of that of `keys`. Of length 1 it is x_T alone.

        Raises:
            UserError: noise of another shape.
        """
        total = self.settings.num_calls
        if noise is not None and noise.shape[:2] not in [(n, len(keys)) for n in (1, total + 1)]:
            raise UserError(
                f"noise must be [{total + 1}, {len(keys)}, ...], or [1, ...] for x_T alone, "
                f"not {noise.shape}"
            )
        yield StepsDone(0, total)  # the first call compiles: a progress bar shows meanwhile
        program, numbers = self.program(), self.numbers()
        state = _begin(program, keys, tuple(shape), None if noise is None else noise[0])
        # noise[0] is x_T. If it came alone, the steps make theirs from `keys`.
        steps_noise = noise[1:] if noise is not None and len(noise) > 1 else None
        done = 0
        # Parts follow each other in time, each with parameters of its own; a call never spans two.
        for part, count in self.parts(params):
            last = done + count
            while done < last:
                steps = min(self.steps_a_call, last - done)
                state = _advance(
                    program,
                    part,
                    cond,
                    numbers,
                    state,
                    # Of a fixed dtype: a Python int would be traced as weakly typed.
                    np.int32(total - 1 - done),
                    np.int32(steps),
                    keys,
                    None if steps_noise is None else steps_noise[done : done + steps],
                )
                done += steps
                yield StepsDone(done, total, state.x_0)
        return state.x_t

    def invert(
        self, params: Params, cond: PyTree, x_0: Array, iterations: int = 1
    ) -> Events[Array]:
        """Finds x_T float32 [b, ...] from which DDIM at eta 0 samples x_0 [b, ...] again.

        Args:
            iterations: network evaluations a step, see `inversion.DDIMInversion`.
            params, cond: see `sample`.
        """
        # All of the image is given: `repeats` are for one that is known in part.
        sampler = dataclasses.replace(self, settings=dataclasses.replace(self.settings, repeats=1))
        total = sampler.settings.num_steps
        yield StepsDone(0, total)
        program, numbers = sampler.program(), sampler.inversion_numbers()
        x_t, done = x_0, 0
        # Inversion starts at the clean end, where sampling stops.
        for part, count in reversed(sampler.parts(params)):
            last = done + count
            while done < last:
                steps = min(self.steps_a_call, last - done)
                x_t = _invert(
                    program,
                    part,
                    cond,
                    numbers,
                    x_t,
                    np.int32(done),
                    np.int32(steps),
                    np.int32(iterations),
                )
                done += steps
                jax.block_until_ready(x_t)  # there is no x_0 to wait for
                yield StepsDone(done, total)
        return x_t

    def inversion_numbers(self) -> Numbers:
        """Returns the arguments of the program that inverts."""
        schedule = self.settings.schedule(self.process)
        length = self.process.num_timesteps
        inverse = tables.padded(tables.tables_of(DDIMInversion(schedule)), length)
        # Only the solver differs: the schedule and guidance belong to the denoiser.
        return self.numbers()._replace(solver=inverse)


# A server asks for the same settings again and again.
@functools.lru_cache(maxsize=64)
def _numbers(sampler: StageSampler) -> Numbers:
    settings, length = sampler.settings, sampler.process.num_timesteps
    schedule = settings.schedule(sampler.process)
    return Numbers(
        solver=tables.padded(tables.tables_of(sampler.make_solver()), length),
        schedule=tables.padded(tables.tables_of(schedule), length),
        cfg_scale=np.float32(settings.cfg_scale),
        cfg_rescale=np.float32(settings.cfg_rescale),
        guided_at=settings.guided_at(sampler.process),
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def _begin(
    program: StageSampler, keys: Array, shape: tuple[int, ...], noise: Array | None
) -> State:
    # The template will do: `begin` asks the solver only for its memory, whose shape depends on its
    # class and not on its tables.
    return begin(program.make_solver(), init_noise(keys, shape) if noise is None else noise)


@functools.partial(jax.jit, static_argnums=0)
def _advance(
    program: StageSampler,
    params: Params,
    cond: PyTree,
    numbers: Numbers,
    state: State,
    first: Array,
    count: Array,
    keys: Array,
    noise: Array | None,
) -> State:
    """Takes `count` steps from t = `first` down."""
    # `program` has placeholders; the numbers of the sampler go in here, as tracers.
    solver = tables.with_tables(program.make_solver(), numbers.solver)
    denoiser = _denoiser(program, params, cond, numbers)
    return advance(solver, denoiser, state, first, count, keys, noise)


def one_step(
    program: StageSampler,
    params: Params,
    cond: PyTree,
    numbers: Numbers,
    state: State,
    t: Array,
    keys: Array,
) -> State:
    """Takes one step, without a loop around it: what ahead-of-time reports compile and count."""
    solver = tables.with_tables(program.make_solver(), numbers.solver)
    return take_step(solver, _denoiser(program, params, cond, numbers), state, t, keys)


@functools.partial(jax.jit, static_argnums=0)
def _invert(
    program: StageSampler,
    params: Params,
    cond: PyTree,
    numbers: Numbers,
    x_t: Array,
    first: Array,
    count: Array,
    iterations: Array,
) -> Array:
    """Takes `count` steps of DDIM backwards, from t = `first` up."""
    template = DDIMInversion(program.settings.schedule(program.process))
    solver = tables.with_tables(template, numbers.solver)
    denoiser = _denoiser(program, params, cond, numbers)
    return invert_steps(solver, denoiser, x_t, first, count, iterations)


def _denoiser(program: StageSampler, params: Params, cond: PyTree, numbers: Numbers) -> Denoiser:
    """Returns the guided network as the solvers see it."""
    process, settings = program.process, program.settings
    schedule = tables.with_tables(settings.schedule(process), numbers.schedule)

    def apply(x_t: Array, t: Array, cond: PyTree) -> Array:
        return program.apply(params, x_t, t, cond)

    # A Python 1.0 turns guidance off while tracing; every other scale is traced.
    guided = guidance.guide(
        apply,
        cond,
        program.null(cond),
        1.0 if settings.cfg_scale == 1 else numbers.cfg_scale,
        process.learned_variance,
        numbers.cfg_rescale,
        numbers.guided_at,
    )
    denoiser = denoiser_from(
        schedule, guided, process.prediction, settings.clip, process.learned_variance
    )
    # Also for a network that is trained to inpaint: its prediction of known pixels is close, not
    # exact.
    known = cond.get("known") if hasattr(cond, "get") else None
    return denoiser if known is None else inpainting.keeping(schedule, denoiser, known)
