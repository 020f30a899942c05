"""The compiled programs of a check and the elementwise comparison that all of them share."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker import rounding
from jaxbp.checker.compare import arrays
from jaxbp.checker.data import cast
from jaxbp.checker.subject import Leaves, Subject, is_float, without_rule

Kinks = Literal["reference", "left", "right", "subgradient"]
FACTOR = {"float64": 64.0}  # error bound ÷ the spread of stochastic rounding; 8 for the shorter dtypes
QUICK: dict[str, Any] = {  # options of jax.jit for programs that run a few times, on numbers of which no speed is asked
    "compiler_options": {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        # half of the compile time; later versions of XLA do not know the option
        **({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}),
    }
}
NEAR = 1e-10  # how far from a kink its two sides are looked at, in float64


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """float64 allowed and implicit promotion as usual, for the reference and for a rule run in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def setting(dtype: str) -> AbstractContextManager[None]:
    """What a rule runs in: the caller's own setting, unless the dtype needs float64."""
    return precise() if dtype == "float64" else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Truth:
    """Reference value and cotangents in float64, and elementwise bounds of what rounding in a dtype may do to them."""

    value: list[np.ndarray]
    cotangents: list[np.ndarray]
    value_bound: list[np.ndarray]
    bound: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A subject with its compiled programs. What is not traceable by JAX (NumPy code) runs as it is."""

    subject: Subject
    kinks: Kinks
    seed: int
    traceable: bool  # the rule
    differentiable: bool  # the reference
    splits_ties: bool  # the reference goes through max, min or abs: its derivative at a tie is nobody's convention

    @cached_property
    def _noise(self) -> np.ndarray:
        return rounding.noise_of(self.seed)

    @cached_property
    def _truth(self) -> Callable[..., Any]:
        return jax.jit(rounding.with_spread(self.subject.truth), **QUICK)

    @cached_property
    def _autodiff(self) -> Callable[..., Any]:
        return jax.jit(self.subject.truth, **QUICK)

    @cached_property
    def rule(self) -> Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]:
        return jax.jit(self.subject.pullback) if self.traceable else self.subject.pullback

    @cached_property
    def precise_rule(self) -> Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]:
        return jax.jit(self.subject.pullback, **QUICK) if self.traceable else self.subject.pullback

    @property
    def paths(self) -> list[str]:
        """Of the differentiated leaves."""
        return [self.subject.arguments.paths[position] for position in self.subject.arguments.wrt]

    def bounds(self, leaves: Sequence[Any], cotangents: Leaves, dtype: str) -> list[np.ndarray]:
        """What rounding may do to each cotangent; where JAX cannot differentiate the reference, 256 ε of the leaf."""
        if self.differentiable:
            return self.truth(leaves, cotangents, dtype).bound
        pulled = self.run(leaves, cotangents, dtype)[1]
        return [np.full(g.shape, 256 * float(jnp.finfo(dtype).eps) * np.max(np.abs(g), initial=0.0)) for g in pulled]

    def run(self, leaves: Sequence[Any], cotangents: Leaves, dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The rule's value and cotangents in a dtype; under the caller's own x64 setting unless that is float64."""
        rule = self.precise_rule if dtype == "float64" else self.rule
        with setting(dtype):
            value, pulled = rule(cast(leaves, dtype), [np.asarray(u).astype(dtype) for u in cotangents])
        return [np.asarray(v) for v in value], [np.asarray(g) for g in pulled]

    def truth(self, leaves: Sequence[Any], cotangents: Leaves, dtype: str) -> Truth:
        """The truth at the points as the dtype holds them."""
        points, us = (
            cast(cast(leaves, dtype), "float64"),
            [np.asarray(u).astype(dtype).astype("float64") for u in cotangents],
        )
        with precise():
            (value, want), (value_spread, spread) = self._truth((points, us), rounding.units_of(dtype), self._noise)
        want, value = arrays(want), arrays(value)
        own = self._own_errors(leaves, cotangents, dtype, value, want)
        spreads = [*arrays(value_spread), *arrays(spread)]
        bounds = [_bound(dtype, *parts) for parts in zip((*value, *want), spreads, own, strict=True)]
        return Truth(value, want, bounds[: len(value)], bounds[len(value) :])

    def _own_errors(
        self, leaves: Sequence[Any], cotangents: Leaves, dtype: str, value: Any, want: Any
    ) -> list[np.ndarray]:
        """The error that autodiff of the reference itself makes in the dtype; infinite where it is not finite."""
        if dtype == "float64":
            return [np.zeros(()) for _ in (*value, *want)]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            got = self._autodiff(cast(leaves, dtype), [np.asarray(u).astype(dtype) for u in cotangents])
        with np.errstate(invalid="ignore"):
            errors = [np.abs(a - b) for a, b in zip(arrays([*got[0], *got[1]]), (*value, *want), strict=True)]
        return [np.where(np.isnan(error), np.inf, error) for error in errors]

    def sides(self, leaves: Sequence[Any], cotangents: Leaves, dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Elementwise the least and the greatest cotangent of the reference near the points: at a kink they differ."""
        rng = np.random.default_rng(self.seed)
        found = [self._nearby(leaves, cotangents, dtype, rng.uniform(-1, 1, 8)) for _ in range(12)]
        leaves = [np.stack(leaf) for leaf in zip(*found, strict=True)]
        return [leaf.min(axis=0) for leaf in leaves], [leaf.max(axis=0) for leaf in leaves]

    def side(self, leaves: Sequence[Any], cotangents: Leaves, dtype: str, direction: float) -> list[np.ndarray]:
        """The cotangents just left (−1) or right (+1) of the points."""
        return self._nearby(leaves, cotangents, dtype, np.array([direction]))

    def _nearby(self, leaves: Sequence[Any], cotangents: Leaves, dtype: str, steps: np.ndarray) -> list[np.ndarray]:
        points = cast(cast(leaves, dtype), "float64")
        us = [np.asarray(u).astype(dtype).astype("float64") for u in cotangents]
        rng = np.random.default_rng(abs(int(steps[0] * 1e9)))
        for position in self.subject.arguments.wrt:
            a = points[position]
            step = steps[0] if steps.size == 1 else rng.uniform(-1, 1, a.shape)
            points[position] = a + NEAR * np.where(a == 0, 1, np.abs(a)) * step
        with precise():
            return arrays(self._truth((points, us), rounding.Units(0.0, 0.0, 0.0), self._noise)[0][1])


def _bound(dtype: str, want: np.ndarray, spread: np.ndarray, own: np.ndarray) -> np.ndarray:
    """c × the spread + 4 × autodiff's own error + ε |want| + ε² max |want| + what a dtype without subnormals loses.

    ε² is for saturated functions: of 1 − tanh² nothing is left where the derivative is 10⁻³⁰⁰.
    """
    info = jnp.finfo(dtype)
    spread = np.where(np.isnan(spread), np.inf, spread)
    bound = (
        FACTOR.get(dtype, 8.0) * spread
        + 4 * own
        + 2 * float(info.eps) * np.abs(want)
        + float(info.eps) ** 2 * np.max(np.abs(want), initial=0.0, where=np.isfinite(want))
        + 64 * float(info.smallest_normal)
    )
    return np.where(np.abs(want) > float(info.max) / 16, np.inf, bound)


def trial_of(subject: Subject, leaves: Leaves, kinks: Kinks, seed: int) -> Trial:
    """Finds out what of the subject JAX can trace and differentiate."""
    with precise():
        points = cast(leaves, "float64")
        not_traceable = (jax.errors.JAXTypeError, jax.errors.JAXIndexError, TypeError, NotImplementedError)
        try:
            reference = subject.reference_of(points)
            jaxpr = jax.make_jaxpr(reference)(subject.arguments.differentiated(points))
            value = jax.eval_shape(reference, subject.arguments.differentiated(points))
            jax.eval_shape(subject.truth, points, [np.zeros(v.shape, v.dtype) for v in value])
            differentiable, ties = True, rounding.splits_ties(jaxpr.jaxpr)
        except not_traceable:
            differentiable, ties = False, False
        return Trial(subject, kinks, seed, _traceable(subject, points), differentiable, ties)


def _traceable(subject: Subject, points: Leaves) -> bool:
    """Whether the rule is JAX code; a NumPy function stumbles over a tracer."""
    if subject.kind == "vjp":
        return True
    try:
        jax.eval_shape(subject.pullback, points, [])
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
        return False
    except Exception:  # it is traceable and wrong: the contract check says how
        return True
    return True


def first_use(subject: Subject, leaves: Leaves) -> dict[str, int]:
    """For each differentiated leaf, when the reference's forward pass first computes with it."""
    with precise():
        points = subject.arguments.differentiated(cast(leaves, "float64"))
        jaxpr = jax.make_jaxpr(without_rule(subject.reference_of(cast(leaves, "float64"))))(points).jaxpr
    aliases = {var: n for n, var in enumerate(jaxpr.invars)}
    used: dict[int, int] = {}
    for count, equation in enumerate(jaxpr.eqns):
        touched = {aliases[atom] for atom in equation.invars if not hasattr(atom, "val") and atom in aliases}
        if equation.primitive.name in rounding.EXACT - {"max", "min", "abs"} and len(equation.invars) == 1 and touched:
            aliases[equation.outvars[0]] = touched.pop()
            continue
        for n in touched:
            used.setdefault(n, count)
    return {subject.arguments.paths[p]: used.get(n, -1) for n, p in enumerate(subject.arguments.wrt)}


def outputs_like(trial: Trial, leaves: Leaves) -> list[Any]:
    """Shapes and dtypes of the float outputs, as the cotangents have them, in float64."""
    if trial.subject.kind == "gradient":
        return [jax.ShapeDtypeStruct((), np.float64)]
    with precise():
        function = trial.subject.reference if trial.differentiable else trial.subject.function
        points = cast(leaves, "float64")
        try:
            found = jax.eval_shape(lambda p: function(*trial.subject.arguments.call(p)), points)
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError):
            found = function(*trial.subject.arguments.call(points))
        return [leaf for leaf in jax.tree.leaves(found) if is_float(leaf)]
