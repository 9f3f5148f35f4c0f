"""What the samplers of all stages share: settings, guidance, and the loop with its progress."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import analytic, guidance, inpainting, schedules
from dalle2_jax.diffusion.inversion import DDIMInversion
from dalle2_jax.diffusion.process import Process
from dalle2_jax.diffusion.sample import advance, denoiser_from, init_noise
from dalle2_jax.diffusion.solvers import check_name, make_solver, spacing_for
from dalle2_jax.errors import UserError
from dalle2_jax.types import Array, Denoiser, Params, PyTree, Solver

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_STEPS_A_CALL = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a stage is sampled; the defaults of a model stand in its folder's `config.json`."""

    steps: int | tuple[int, ...] = 50  # several: how many in each equal part of time
    solver: str = "ddim"
    cfg_scale: float = 1.0
    clip: tuple[str, float] | None = ("static", 1.0)
    spacing: str = ""  # of the steps, see `schedules.respace`; "": what suits the solver
    eta: float = 0.0  # of ddim: 0 draws without noise, 1 is ddpm
    variance: str = "small"  # of ddpm, where none was learned; or "large", or "analytic", from
    # `StageSampler.x_0_error`; this of ddim as well, which then draws with noise at any eta
    cfg_interval: tuple[float, float] | None = None  # of sigma / alpha, see `guidance.within`
    cfg_rescale: float = 0.0  # 0 to 1: how far guidance keeps the contrast, see `guidance.guided`
    repeats: int = 1  # of a step, for a picture known in part: see `inpainting.Resampling`

    def __post_init__(self) -> None:
        check_name(self.solver)
        counts = self.steps if isinstance(self.steps, tuple) else (self.steps,)
        if not counts or not all(type(n) is int and n >= 1 for n in counts):
            raise UserError(f"steps must be whole numbers of 1 or more, not {self.steps!r}")
        if isinstance(self.steps, tuple) and self.spacing not in ("", "sections"):
            told = f"spacing={self.spacing!r} takes one number of steps"
            raise UserError(f"{told}, not {self.steps!r}")
        match self.clip:
            case None:
                pass
            case (str(), int() | float() as bound) if bound is not True and 0 < bound < math.inf:
                pass
            case _:
                kinds = 'null, ["static", bound] or ["dynamic", percentile]'
                raise UserError(f"clip must be {kinds}, not {self.clip!r}")
        for name in ("cfg_scale", "eta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value!r}")
        match self.cfg_interval:
            case None:
                pass
            case (int() | float() as low, int() | float() as high) if 0 <= low < high < math.inf:
                pass
            case _:
                told = "cfg_interval must be null or [low, high] of sigma / alpha, 0 <= low < high"
                raise UserError(f"{told}, not {self.cfg_interval!r}")
        value = self.cfg_rescale
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"cfg_rescale must be a number within 0 and 1, not {value!r}")
        if type(self.repeats) is not int or self.repeats < 1:
            raise UserError(f"repeats must be a whole number of 1 or more, not {self.repeats!r}")
        if self.variance not in ("small", "large", "analytic"):
            known = "'small', 'large' or 'analytic'"
            raise UserError(f"variance must be {known}, not {self.variance!r}")
        if self.repeats > 1:
            what = "RePaint's resampling, for a decoder that was not taught to inpaint"
            told = f"repeats={self.repeats} ({what})"
            if (self.solver, self.eta) != ("ddim", 0):
                other = f"{self.solver} at eta={self.eta:g}"
                raise UserError(f"{told} goes with ddim at eta=0, not {other}")
            if self.variance == "analytic":  # a step and the way back would share one noise
                raise UserError(f'{told} does not go with variance="analytic"')

    @property
    def num_steps(self) -> int:
        return sum(self.steps) if isinstance(self.steps, tuple) else self.steps

    @property
    def num_calls(self) -> int:
        """How often the solver is called."""
        return inpainting.num_calls(self.num_steps, self.repeats)

    def schedule(self, process: Process) -> schedules.Schedule:
        """The part of the process' schedule that is sampled."""
        spacing = self.spacing or ("sections" if isinstance(self.steps, tuple) else "")
        spacing = spacing or spacing_for(self.solver)
        return schedules.respace(process.training_schedule(), self.steps, spacing)

    def guided_at(self, process: Process) -> np.ndarray | None:
        """Where the process is guided, bool [num_timesteps]; None: everywhere."""
        if self.cfg_interval is None:
            return None
        return guidance.within(process.training_schedule(), self.cfg_interval)

    def make_solver(
        self, schedule: schedules.Schedule, variances: np.ndarray | None = None
    ) -> Solver:
        """The solver over `schedule`; `variances` are its analytic ones."""
        variance = self.variance if variances is None else variances
        options: dict[str, Any] = {
            "ddim": {"eta": self.eta, "variance": variances},
            "ddpm": {"variance": variance},
        }
        solver = make_solver(self.solver, schedule, **options.get(self.solver, {}))
        if self.repeats == 1:
            return solver
        return inpainting.Resampling(solver, schedule, self.repeats)


@dataclasses.dataclass(frozen=True)
class StageSampler:
    """Draws x_0 [b, ...] from a stage's network.

    A subclass says how the network is called (`apply`) and what "no condition" is (`null`).
    Hashable, so that a jitted function takes it as a static argument.
    """

    network: nn.Module
    process: Process
    settings: Settings
    x_0_error: tuple[float, ...] = dataclasses.field(default=(), kw_only=True)
    """What `analytic.measure` found at the end of training; (): nothing did."""

    @property
    def shape(self) -> tuple[int, ...]:
        """One example's."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """How many are drawn for a picture."""
        return 1

    def __post_init__(self) -> None:
        most = self.process.num_timesteps
        if self.settings.num_steps > most:
            raise UserError(f"steps must be at most {most}, not {self.settings.steps}")
        given = getattr(self.network, "learned_variance", False), self.process.learned_variance
        if given[0] != given[1]:
            told = "learned_variance is {} in model, {} in diffusion: set both alike"
            raise UserError(told.format(*given))
        self.make_solver()  # settings that do not go together are told before anything is drawn

    def make_solver(self) -> Solver:
        settings, schedule = self.settings, self.settings.schedule(self.process)
        if settings.variance != "analytic" or settings.solver not in ("ddpm", "ddim"):
            return settings.make_solver(schedule)
        if self.process.learned_variance:
            raise UserError('variance="analytic" goes with no learned variance: take another')
        if len(self.x_0_error) != analytic.KNOTS:
            told = 'variance="analytic" needs x_0_error, which a prior\'s training measures: see'
            raise UserError(f'{told} docs/sampling.md, or set variance="small" in config.json')
        eta = settings.eta if settings.solver == "ddim" else 1.0
        found = analytic.variances(schedule, self.process.num_timesteps, self.x_0_error, eta)
        return settings.make_solver(schedule, found)

    def apply(self, params: Params, x_t: Array, t: Array, cond: PyTree) -> Array:
        """x_t [b, ...], t int32 [b] of the training schedule -> the network's raw output."""
        raise NotImplementedError

    def null(self, cond: PyTree) -> PyTree:
        """The condition that guidance moves away from."""
        raise NotImplementedError

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for a batch; a guided evaluation, of twice the rows,
        counts once."""
        return self.make_solver().evaluations

    def parts(self, params: Params) -> list[tuple[Params, int]]:
        """(parameters, the number of steps that they serve), in the order of sampling."""
        return [(params, self.settings.num_calls)]

    def draw(
        self,
        params: Params,
        cond: PyTree,
        keys: Array,
        shape: Sequence[int],
        noise: Array | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """x_0 float32 [b, *shape].

        Args:
            params: the network's.
            cond: what `apply` takes, arrays [b, ...]. Of a picture that is known in part
                cond["known"] [b, h, w, 4] holds what is: see `masks` and `inpainting.keeping`.
            keys: typed keys [b]; row i of the result depends on row i of its inputs alone.
            shape: one example's.
            noise: [1 + steps, b, *shape] standard normal: x_T, then each step's, in the order of
                sampling; in place of that drawn from `keys`. Of length 1 it is x_T alone.
            progress: called at the start and as steps are done.
        """
        steps = self.settings.num_calls
        if noise is not None and noise.shape[:2] not in [(n, len(keys)) for n in (1, steps + 1)]:
            told = f"[{steps + 1}, {len(keys)}, ...], or [1, ...] for x_T alone"
            raise UserError(f"noise must be {told}, not {noise.shape}")
        if progress is not None:
            progress(0, steps)  # the first call compiles: the bar is there meanwhile
        state, done = start(self, keys, tuple(shape), noise), 0
        for part, count in self.parts(params):
            chunk = steps_a_call(count)
            for _ in range(0, count, chunk):
                ts = jnp.arange(steps - 1 - done, steps - 1 - done - chunk, -1)
                given = None
                if noise is not None and len(noise) > 1:
                    given = noise[1 + done : 1 + done + chunk]
                state, done = advance_steps(self, part, cond, state, ts, keys, given), done + chunk
                if progress is not None:
                    jax.block_until_ready(state)
                    progress(done, steps)
        return state[0]

    def invert(
        self,
        params: Params,
        cond: PyTree,
        x_0: Array,
        iterations: int = 1,
        progress: Progress | None = None,
    ) -> Array:
        """x_T float32 [b, ...] from which DDIM at eta 0 draws x_0 [b, ...], with these settings.

        `iterations` of the network a step: see `inversion.DDIMInversion`. The others: see `draw`.
        """
        # The whole picture is given: `repeats` are for one that is known in part.
        stage = dataclasses.replace(self, settings=dataclasses.replace(self.settings, repeats=1))
        steps = stage.settings.num_steps
        if progress is not None:
            progress(0, steps)
        x_t, done = x_0, 0
        for part, count in reversed(stage.parts(params)):
            chunk = steps_a_call(count)
            for _ in range(0, count, chunk):
                ts = jnp.arange(done, done + chunk)
                x_t, done = invert_steps(stage, part, cond, x_t, ts, iterations), done + chunk
                if progress is not None:
                    jax.block_until_ready(x_t)
                    progress(done, steps)
        return x_t


def no_caption(cond: Mapping[str, Any], learned_null: bool) -> Mapping[str, Any]:
    """What "no caption" puts in the place of `cond`'s: a mask that shows nothing, the learned null,
    or without one cond["empty"], the empty caption's encoding (z_txt, txt_enc, txt_mask)."""
    if learned_null:
        return {"txt_mask": jnp.zeros_like(cond["txt_mask"])}
    assert "empty" in cond, "a network without a learned null is told the empty caption"
    return {name: value for name, value in cond["empty"].items() if name in cond}


def steps_a_call(steps: int) -> int:
    """How many steps a call runs: a divisor of all, so that one program serves every call."""
    return max(n for n in range(1, _STEPS_A_CALL + 1) if steps % n == 0)


@functools.partial(jax.jit, static_argnums=(0, 2))
def start(
    stage: StageSampler, keys: Array, shape: tuple[int, ...], noise: Array | None
) -> tuple[Array, PyTree]:
    x_T = init_noise(keys, shape) if noise is None else noise[0]
    return x_T, stage.make_solver().init(x_T)


@functools.partial(jax.jit, static_argnums=0)
def advance_steps(
    stage: StageSampler,
    params: Params,
    cond: PyTree,
    state: tuple[Array, PyTree],
    ts: Array,
    keys: Array,
    noise: Array | None,
) -> tuple[Array, PyTree]:
    schedule = stage.settings.schedule(stage.process)
    solver = stage.make_solver()
    return advance(solver, _denoiser(stage, params, cond, schedule), state, ts, keys, noise)


@functools.partial(jax.jit, static_argnums=(0, 5))
def invert_steps(
    stage: StageSampler, params: Params, cond: PyTree, x_t: Array, ts: Array, iterations: int
) -> Array:
    schedule = stage.settings.schedule(stage.process)
    solver = DDIMInversion(schedule, iterations)
    unused = jnp.zeros((len(ts), 1))  # noise
    denoiser = _denoiser(stage, params, cond, schedule)
    return advance(solver, denoiser, (x_t, solver.init(x_t)), ts, None, unused)[0]


def _denoiser(
    stage: StageSampler, params: Params, cond: PyTree, schedule: schedules.Schedule
) -> Denoiser:
    process, settings = stage.process, stage.settings
    guided = guidance.guide(
        functools.partial(_apply, stage, params),
        cond,
        stage.null(cond),
        settings.cfg_scale,
        process.learned_variance,
        settings.cfg_rescale,
        settings.guided_at(process),
    )
    denoiser = denoiser_from(
        schedule, guided, process.prediction, settings.clip, process.learned_variance
    )
    known = cond.get("known") if isinstance(cond, Mapping) else None
    return denoiser if known is None else inpainting.keeping(schedule, denoiser, known)


def _apply(stage: StageSampler, params: Params, x_t: Array, t: Array, cond: Any) -> Array:
    return stage.apply(params, x_t, t, cond)
