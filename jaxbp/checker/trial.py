"""The compiled programs of a check: the rule, the truth with what rounding may do to it, the reference in a dtype."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.checker import rounding
from jaxbp.checker.compare import arrays, f64
from jaxbp.checker.data import cast
from jaxbp.checker.jaxpr import OPAQUE, equations, primitives
from jaxbp.checker.subject import Leaves, Pulled, Subject, is_float, split

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
MIXED = "as given"  # every leaf in its own dtype
SOLVED = 1e-4  # how well a while_loop is taken to solve what it solves, if nothing is said
FAULT = "the checker cannot evaluate the reference equation by equation"
UNTRACEABLE = (
    jax.errors.TracerArrayConversionError,
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Implicit promotion as usual, for the reference."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """float64 allowed as well, for the reference and for a rule run in float64."""
    with jax.enable_x64(True), lenient():
        yield


class Settings(NamedTuple):
    """What the caller asks for."""

    example: Leaves  # the array leaves of the arguments, some of them only shapes
    domain: list[Any]  # of each
    level: str
    seed: int
    probes: int
    order: int
    kinks: Kinks
    dtypes: tuple[str, ...]  # () for the default
    accuracy: float | None
    allow_zero: bool | Sequence[int | str]


@dataclasses.dataclass(frozen=True)
class Truth:
    """In float64: value and cotangents, elementwise bounds of what rounding in a dtype may do to them, and the value of
    the reference, which may be another.
    """

    value: Leaves
    cotangents: Leaves
    value_bound: Leaves
    bound: Leaves
    reference: Leaves
    reference_bound: Leaves


@dataclasses.dataclass(eq=False)
class Trial:
    """A subject with its compiled programs. What is not traceable by JAX (NumPy code) runs as it is."""

    subject: Subject
    given: list[Any]
    settings: Settings
    accuracy: float = 0.0
    traceable: bool = True  # the rule
    oracle: str = ""  # the dtype in which autodiff of the reference is the most precise; "" where there is none
    why_not: str = ""  # there is none
    strict: str = "float64"  # the most precise dtype in which the rule itself computes
    differenced: str = "float64"  # what the reference computes in when differences are taken of it
    scales: Leaves | None = None  # the largest cotangent of each leaf at the first points
    failing: tuple[str, Leaves, Leaves, str] | None = None  # the first regime, points, cotangents, dtype that failed
    notes: list[str] = dataclasses.field(default_factory=list)  # what was not checked, and why
    _programs: dict[Any, Any] = dataclasses.field(default_factory=dict)
    _truths: dict[Any, Truth] = dataclasses.field(default_factory=dict)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    @property
    def paths(self) -> list[str]:
        """Of what a rule gives: the differentiated leaves, or in forward mode the outputs."""
        if self.subject.forward:
            return [f"output[{n}] tangent" for n in range(len(self.outputs))]
        return self.subject.arguments.differentiated(self.subject.arguments.paths)

    @property
    def outputs(self) -> list[Any]:
        """Shapes and dtypes of the float outputs at the given points."""
        return self._shapes(self.main)

    @cached_property
    def main(self) -> str:
        """The dtype of the example."""
        found = {str(leaf.dtype) for leaf in self.given if is_float(leaf)}
        return MIXED if len(found) > 1 else next(iter(found))

    def info(self, dtype: str) -> Any:
        """finfo of the dtype, of the shortest one where each leaf has its own."""
        found = [leaf.dtype for leaf in self.given if is_float(leaf)] if dtype == MIXED else [dtype]
        return jnp.finfo(max(map(jnp.dtype, found), key=lambda d: float(jnp.finfo(d).eps)))

    def setting(self, dtype: str) -> AbstractContextManager[None]:
        """What a rule runs in: the caller's own setting, unless the dtype needs float64."""
        wide = dtype == MIXED and any(leaf.dtype == np.float64 for leaf in self.given)
        return precise() if dtype == "float64" or wide else contextlib.nullcontext()

    def _shapes(self, dtype: str) -> list[Any]:
        def function(p: Leaves) -> Leaves:
            return split(self.subject.function(*self.subject.arguments.call(p)))[0]

        def make() -> Any:
            points = self.cast(self.given, dtype)
            with self.setting(dtype), lenient():
                try:
                    return jax.eval_shape(function, points)
                except Exception as error:  # NumPy code takes no tracers
                    try:
                        return function(points)
                    except Exception:
                        raise error from None

        return list(self._once(("shapes", dtype), make))

    @property
    def inputs(self) -> list[Any]:
        """What a rule is linear in: cotangents of the outputs, or tangents of the differentiated leaves."""
        return self.subject.arguments.differentiated(self.given) if self.subject.forward else self.outputs

    def dense(self) -> Leaves:
        """Cotangents N(0, 1), or for a gradient the 1 that it belongs to."""
        if self.subject.kind == "gradient":
            return [np.full(v.shape, float(n == 0)) for n, v in enumerate(self.inputs)]
        rng = np.random.default_rng(self.settings.seed + 3)
        return [rng.standard_normal(v.shape) for v in self.inputs]

    def cast(self, leaves: Sequence[Any], dtype: str) -> list[np.ndarray]:
        """The float leaves in a dtype, or each in its own."""
        if dtype != MIXED:
            return cast(leaves, dtype)
        return [np.asarray(a).astype(own.dtype) for a, own in zip(leaves, self.given, strict=True)]

    def rounded(self, us: Leaves, dtype: str) -> list[np.ndarray]:
        """Cotangents as the outputs' own dtypes hold them."""
        if self.subject.forward:
            arguments = self.subject.arguments
            return arguments.differentiated(self.cast(arguments.replaced(self.given, us), dtype))
        return [np.asarray(u).astype(v.dtype) for u, v in zip(us, self._shapes(dtype), strict=True)]

    def run(self, leaves: Sequence[Any], us: Leaves, dtype: str) -> Pulled:
        """What the rule gives in a dtype; under the caller's own x64 setting unless that is float64."""
        options = {} if dtype == self.main else QUICK
        rule = pullback = self.subject.pullback
        points: list[Any] = self.cast(leaves, dtype)
        with self.setting(dtype):
            if self.traceable:
                rule = self._once(("rule", bool(options)), lambda: jax.jit(pullback, **options))
            elif self.subject.kind == "vjp":
                points = [jnp.asarray(a) for a in points]
            found = rule([a.copy() for a in points], self.rounded(us, dtype))
        value, cotangents, others = ([np.array(a) for a in part] for part in found)
        return Pulled(value, self.projected(points, cotangents), others)

    def projected(self, leaves: Sequence[Any], cotangents: Leaves) -> Leaves:
        """What of the cotangents counts: their part in the tangent space of an argument that has one."""
        project, arguments = self.subject.project, self.subject.arguments
        if not project or self.subject.forward:
            return cotangents
        return [
            np.asarray(project[arguments.owners[p]](np.asarray(leaves[p]), g)) if arguments.owners[p] in project else g
            for p, g in zip(arguments.wrt, cotangents, strict=True)
        ]

    def truth(self, leaves: Sequence[Any], us: Leaves, dtype: str) -> Truth:
        """The truth at the points as the dtype holds them; the last ones are remembered."""
        points, us = self.cast(leaves, dtype), self.rounded(us, dtype)
        asked = dtype, *(hash(a.tobytes()) for a in (*points, *us))
        if asked not in self._truths:
            self._truths = dict([*self._truths.items()][-7:]) | {asked: self._truth(points, us, dtype)}
        return self._truths[asked]

    def _truth(self, points: Leaves, us: Leaves, dtype: str) -> Truth:
        _, counts, dtypes = self._traced(dtype)
        least = min if dtype == MIXED else max  # what is given in float32 beside bfloat16 is not rounded to that
        unit = 0.0 if dtype == "float64" else least(float(jnp.finfo(d).eps) / 2 for d in dtypes)
        units = self._traced(dtype)[0].units
        exact, low, high = self._evaluated(points, us, dtype, unit, units, 0 * units)
        spread = [f64(np.maximum(e - a, b - e)) for e, a, b in zip(exact, low, high, strict=True)]
        bounds = [self._bound(str(d), v, s) for d, v, s in zip(dtypes, exact, spread, strict=True)]
        own, value = counts[0], counts[0] + counts[1]
        if self.scales is None:
            self.scales = [np.max(np.abs(c), initial=0.0, where=np.isfinite(c)) for c in exact[value:]]
        lost = self.accuracy + 2.2e-16 * (dtype == "float64")  # of two numbers that differ by 1e-22 the difference is 0
        bounds[value:] = [b + lost * scale for b, scale in zip(bounds[value:], self.scales, strict=True)]
        if self.oracle and dtype in ("float64", "float32"):
            # p (u − Σ p u) loses ε |u| where p is about 1, and p = exp(a − log Σ exp a) loses ε |a| p
            unit, sums = 16 * float(jnp.finfo(dtype).eps), zip(self.scales, self.coupled, strict=True)
            sizes = (np.max(np.abs(v), initial=1.0, where=np.isfinite(v)) for v in exact[:value])
            lost = unit * max(sizes) * ("exp" in self.operations)
            for n, (scale, several) in enumerate(sums, value):
                share = np.minimum(np.abs(exact[n]), scale) if lost < 1 else scale
                bounds[n] = bounds[n] + unit * scale * several + lost * np.nan_to_num(share)
        if self.oracle and self.operations & rounding.FACTORIZATIONS:  # accurate in norm, not element by element
            bounds[value:] = [np.maximum(b, np.max(b, initial=0, where=np.isfinite(b))) for b in bounds[value:]]
        if self.subject.forward:  # nothing is said of the derivative where the output itself is infinite
            finite = map(np.isfinite, exact[own:value])
            bounds[value:] = [np.where(f, b, np.inf) for f, b in zip(finite, bounds[value:], strict=True)]
        first, cotangents = own or value, self.projected([f64(a) for a in points], exact[value:])
        return Truth(exact[:first], cotangents, bounds[:first], bounds[value:], exact[own:value], bounds[own:value])

    def _evaluated(
        self, points: Leaves, us: Leaves, dtype: str, own: Any, units: np.ndarray, least: np.ndarray, zero: float = 0.0
    ) -> tuple[Leaves, Leaves, Leaves]:
        """Outputs and cotangents in float64; the least and the greatest where the leaves and the result of every
        operation are moved by 4 × their own units, a leaf of 0 as if it were another number.
        """
        found = self._traced(dtype)[0]
        run = self._once(("truth", found.text), lambda: jax.jit(rounding.with_spread(found), **QUICK))
        leaves, noise = [f64(a) if is_float(a) else a for a in (*points, *us)], rounding.noise_of(self.settings.seed)
        with precise():
            outputs = run(found.consts, leaves, found.literals, units, least, np.full(len(leaves), own), zero, noise)
        exact, low, high = map(arrays, outputs)
        return exact, low, high

    @cached_property
    def coupled(self) -> list[bool]:
        """Of each leaf, whether one of several outputs depends on more than one of its numbers."""
        hot = [np.zeros(v.shape) for v in self.inputs]
        largest = max(hot, key=np.size)
        if largest.size < 2:
            return [False] * len(self.paths)
        largest.flat[0] = 1.0
        return [bool(np.count_nonzero(c) > 1) for c in self.near(self.given, hot, self.oracle, [])[0]]

    def near(
        self, leaves: Sequence[Any], us: Leaves, dtype: str, shifts: Leaves, moved: float = 0.0, results: float = 0.0
    ) -> list[Leaves]:
        """The cotangents of the reference next to the points, the first wrt leaves shifted by 10⁻¹⁰ × their size × a
        shift. Also the least and the greatest where all wrt leaves are moved by up to 4 × moved of their size, or the
        results of operations by 4 × results: so the rows of a network are at their kinks independently. No mask moves.
        """
        points, wrt = [f64(a) if is_float(a) else a for a in self.cast(leaves, dtype)], self.subject.arguments.wrt
        for position, shift in zip(wrt, shifts, strict=False):
            a = points[position]
            points[position] = a + NEAR * np.where(np.isinf(a), 0, np.where(a == 0, 1, np.abs(a))) * shift
        own = np.isin(np.arange(len(points) + len(us)), wrt) * moved
        traced, counts, _ = self._traced(self.oracle)
        units = np.full_like(traced.units, results)
        least = 10 ** (24 * traced.depth - 34) * (results > 0)  # what a comparison decides outweighs those before it
        found = self._evaluated(points, self.rounded(us, dtype), self.oracle, own, units, least, zero=1.0)
        return [self.projected(points, part[sum(counts) :]) for part in found]

    def _traced(self, dtype: str) -> Any:
        """The jaxpr of the truth, how many values of function and reference it begins with, and the dtypes of all."""

        def make() -> Any:
            points, us = self.cast(self.given, dtype), self.rounded([np.ones(v.shape) for v in self.inputs], dtype)
            with self.setting(dtype), lenient():
                closed, shape = jax.make_jaxpr(lambda p, u: self.subject.truth(p, u), return_shape=True)(points, us)
            if dtype == "float64" and _narrow_hosts(closed.jaxpr):
                raise NotImplementedError("a host callback gets float64 only where jax_enable_x64 is set")
            own, value, _ = shape
            if own and [v.shape for v in own] != [v.shape for v in value]:
                texts = (", ".join(str(v.shape) for v in vs) for vs in (value, own))
                raise ValueError("reference returns shapes {}, fun {}".format(*texts))
            dtypes = [v.dtype for v in jax.tree.leaves(shape)]
            return rounding.traced(closed), (len(own), len(value)), dtypes

        return self._once(("traced", dtype), make)

    def own(self, leaves: Sequence[Any], dtype: str) -> tuple[Leaves, Leaves]:
        """The outputs of the function itself: floating-point numbers, and the others."""
        run = self._once("own", lambda: jax.jit(self.subject.own, **QUICK))
        with self.setting(dtype), lenient():
            values, others = run(self.cast(leaves, dtype))
        return [*map(np.asarray, values)], [*map(np.asarray, others)]

    def autodiff(self, leaves: Sequence[Any], us: Leaves, dtype: str) -> tuple[Leaves, Leaves]:
        """The function's value, and cotangents by autodiff of the reference, in the dtype itself."""
        run = self._once("autodiff", lambda: jax.jit(self.subject.truth, **QUICK))
        with self.setting(dtype), lenient():
            own, value, found = run(self.cast(leaves, dtype), self.rounded(us, dtype))
        return arrays(own or value), arrays(found)

    def _bound(self, dtype: str, want: np.ndarray, spread: np.ndarray) -> np.ndarray:
        """c × the spread + ε |want| + ε² max |want| + what a dtype without subnormals loses.

        ε² is for saturated functions: of 1 − tanh² nothing is left where the derivative is 10⁻³⁰⁰.
        """
        if dtype not in ("float64", "float32", "bfloat16", "float16"):
            dtype = "float64"
        info = jnp.finfo(dtype)
        largest = np.max(np.abs(want), initial=0.0, where=np.isfinite(want))
        bound = (
            FACTOR.get(dtype, 8.0) * np.where(np.isnan(spread), np.inf, spread)
            + 2 * float(info.eps) * np.abs(want)
            + (float(info.eps) ** 2 + self.accuracy) * largest
            + 64 * float(info.smallest_normal)
        )
        return np.where(np.abs(want) <= float(info.max) / 16, bound, np.inf)  # nor is anything said of NaN

    def bounds(self, leaves: Sequence[Any], us: Leaves, dtype: str) -> tuple[Leaves, Leaves]:
        """What rounding may do to each cotangent and value; where JAX cannot differentiate the reference, 256 ε."""
        if self.oracle and (dtype != "float64" or self.oracle == "float64"):
            truth = self.truth(leaves, us, dtype)
            return truth.bound, truth.value_bound
        found = self.run(leaves, us, dtype)
        unit = 256 * float(self.info(dtype).eps) + self.accuracy

        def alike(part: Leaves) -> Leaves:
            return [np.full(g.shape, unit * np.max(np.abs(f64(g)), initial=0.0)) for g in part]

        return alike(found.cotangents), alike(found.value)

    @cached_property
    def operations(self) -> set[str]:
        """The names of the reference's primitives."""
        return primitives(self.formula.jaxpr)

    @property
    def waits(self) -> bool:
        """Function or reference have a loop that ends when something has converged."""
        found = self.operations
        with contextlib.suppress(Exception):  # what the function raises is the contract's to say
            found = found | primitives(self.rule_of_function.jaxpr)
        return "while" in found

    @cached_property
    def formula(self) -> Any:
        """The closed jaxpr of the reference, without the rule, as a function of all leaves."""
        dtype = self.oracle or self.main
        with self.setting(dtype), lenient():
            return jax.make_jaxpr(self.subject.referred)(self.cast(self.given, dtype))

    @cached_property
    def rule_of_function(self) -> Any:
        """The closed jaxpr of the function under test as it is called, without derivative."""
        with self.setting(self.main):
            run = lambda p: self.subject.outputs(self.subject.rule, p)  # noqa: E731
            return jax.make_jaxpr(run)(self.cast(self.given, self.main))

    @cached_property
    def line(self) -> Callable[[Leaves], list[np.ndarray]]:
        """points ↦ the reference's value in float64."""
        run = jax.jit(rounding.exact(self.formula), **QUICK) if self.oracle else self._as_it_is()

        def value(points: Leaves) -> list[np.ndarray]:
            with self.setting(self.differenced), lenient():
                return arrays(run(self.cast(points, self.differenced)))

        return value

    def _as_it_is(self) -> Callable[[Leaves], Leaves]:
        """The reference without autodiff, compiled if it can be, in float64 if it takes that."""
        run = lambda p: self.subject.outputs(self.subject.reference, p)[0]  # noqa: E731
        try:
            hosts = _narrow_hosts(jax.make_jaxpr(run)(self.cast(self.given, self.main)).jaxpr)
        except Exception:  # NumPy code
            hosts = False
        dtypes = [self.main] if hosts else ["float64", self.main]
        for dtype, candidate in ((d, c) for d in dtypes for c in (jax.jit(run), run)):
            try:
                with self.setting(dtype), lenient():
                    found = [dtype, *(str(v.dtype) for v in candidate(self.cast(self.given, dtype)))]
            except Exception:  # float32 only, NumPy code under jit: the next one is tried
                continue
            self.differenced = max(found, key=lambda d: float(self.info(d).eps))
            return candidate
        self.differenced = self.main
        return run

    def rule_in(self, dtype: str) -> Any:
        """The jaxpr of the rule, forward and backward."""

        def make() -> Any:
            points, us = self.cast(self.given, dtype), [np.ones(v.shape) for v in self.inputs]
            with self.setting(dtype):
                return jax.make_jaxpr(self.subject.pullback)(points, self.rounded(us, dtype)).jaxpr

        return self._once(("rule", dtype), make)


def _narrow_hosts(jaxpr: Any) -> bool:
    """Whether it calls the host, on a thread that does not know that float64 is allowed here."""
    return bool({"pure_callback", "io_callback"} & primitives(jaxpr)) and not jax.config.read("jax_enable_x64")


def trial_of(subject: Subject, leaves: Leaves, settings: Settings) -> Trial:
    """Finds out what of the subject JAX can trace and differentiate."""
    trial = Trial(subject, leaves, settings, settings.accuracy or 0.0)
    _ = trial.outputs  # a function that does not take its own arguments is the caller's to see
    _differentiate(trial)
    trial.traceable = _traceable(trial)
    longer = ("float64", "float32")[: {"float64": 0, "float32": 1}.get(trial.main, 2)]
    trial.strict = next((dtype for dtype in longer if _keeps(trial, dtype)), trial.main)
    if settings.accuracy is None and trial.oracle and trial.waits:
        trial.accuracy = SOLVED
    return trial


def _differentiate(trial: Trial) -> None:
    """Finds the dtype of the oracle, or says why there is none: JAX has no derivative of the reference, or the checker
    fails at what JAX can do.
    """
    for dtype, compares in ((d, c) for d in dict.fromkeys(("float64", trial.main)) for c in (True, False)):
        trial.subject = dataclasses.replace(trial.subject, compares=compares)
        trial._programs.clear()
        trial._truths.clear()
        said = "JAX cannot differentiate the reference"
        try:
            trial._traced(dtype)
            said = FAULT
            trial.truth(trial.given, trial.dense(), dtype)
            trial.oracle, trial.why_not = dtype, ""
            trial._truths.clear()  # their bounds were those of a trial without oracle
            return
        except Exception as error:  # anything may come out of a user's function when it is given tracers or float64
            trial.why_not = f"{said}: {first_line(error)}"
            if str(error).startswith("reference returns"):
                raise
    subject, points = trial.subject, trial.cast(trial.given, trial.main)
    plain = lambda p: subject.outputs(subject.reference, p)[0]  # noqa: E731
    for said, run in (("", plain), (FAULT, subject.referred)):
        try:
            with trial.setting(trial.main), lenient():
                jax.eval_shape(run, points)
        except Exception as error:  # NumPy code at the first of the two
            trial.why_not = f"{said}: {first_line(error)}" if said else trial.why_not
            return


def _keeps(trial: Trial, dtype: str) -> bool:
    """Whether the rule computes in this dtype all the way, without a cast to a shorter one."""
    if not trial.traceable:
        return False
    try:
        jaxpr = trial.rule_in(dtype)
    except Exception:  # float32 only, say: what it raises in its own dtype is the contract's business
        return False
    if primitives(jaxpr) & OPAQUE - {"shard_map", "custom_linear_solve"}:  # what is in these two is seen
        return False
    casts = (e for e in equations(jaxpr) if e.primitive.name == "convert_element_type")
    return all(rounding.unit_of(cast) <= float(trial.info(dtype).eps) / 2 * (dtype != "float64") for cast in casts)


def _traceable(trial: Trial) -> bool:
    """Whether the rule is JAX code; a NumPy function stumbles over a tracer."""
    try:
        trial.rule_in(trial.main)
    except UNTRACEABLE:
        return False
    except Exception:  # traceable and wrong, as the contract check will say, if it raises without tracers, too
        if trial.subject.kind == "vjp":
            return True
        try:
            trial.subject.pullback(trial.cast(trial.given, trial.main), [])
        except Exception:
            return True
        return False
    return True


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def first_use(trial: Trial) -> dict[str, int]:
    """For each differentiated leaf, when the reference's forward pass first computes with it."""
    jaxpr = trial.formula.jaxpr
    aliases = {var: n for n, var in enumerate(jaxpr.invars)}
    used: dict[int, int] = {}
    for count, equation in enumerate(jaxpr.eqns):
        touched = {aliases[atom] for atom in equation.invars if not hasattr(atom, "val") and atom in aliases}
        moved = rounding.EXACT | {"convert_element_type"}
        if equation.primitive.name in moved - {"max", "min", "abs"} and len(equation.invars) == 1 and touched:
            aliases[equation.outvars[0]] = touched.pop()
            continue
        for n in touched:
            used.setdefault(n, count)
    return {trial.subject.arguments.paths[p]: used.get(p, -1) for p in trial.subject.arguments.wrt}
