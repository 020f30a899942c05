"""How far rounding alone can move a gradient: stochastic arithmetic on the jaxpr of the reference.

The reference's jaxpr, traced in the dtypes under test, is evaluated in float64, and again with the result of every
operation moved by a random amount of the size that its own dtype would round it by: u |result|, and u (|A| |B|) for a
matrix product or a sum; a matrix that is factorized by u of its largest number. A cast to a shorter dtype is a rounding
like any other. The spread is an elementwise error bound that knows the function's own conditioning and cancellation,
and is the same kind of bound as c √K u |A||B| for one product (Higham 2002, §3.1), carried through all the operations
that follow.

Source: J. Vignes, "A stochastic arithmetic for reliable scientific computation", Math. Comput. Simul. 35, 1993.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbp.checker.jaxpr import (
    ENTERED,
    LOOPS,
    OPAQUE,
    TIES,
    Walk,
    closed_call,
    evaluate,
    lift,
    lifted,
    literals,
    primitives,
    text_of,
)
from jaxbp.checker.subject import is_complex, is_inexact

Array = jax.Array
AMPLITUDE = 4.0  # of the random rounding, in units of u: exp or tanh of XLA is not rounded to half a unit
DRAWS, NOISE = 12, 2**14
UNENTERED = frozenset({"while", "shard_map"})  # their results are moved, not what happens inside
EXACT = frozenset(
    "abs and argmax argmin broadcast broadcast_in_dim ceil clamp concatenate copy copy_p "
    "device_put dynamic_slice dynamic_update_slice eq expand_dims floor gather ge gt iota is_finite le lt max min ne "
    "neg not optimization_barrier or pad real imag reduce_and reduce_max reduce_min reduce_or reshape rev "
    "round scatter select_and_gather_add select_n sharding_constraint sign slice sort split squeeze stop_gradient "
    "top_k tile transpose xor".split()
)
FACTORIZATIONS = frozenset("cholesky eig eigh geqp3 geqrf hessenberg lu qr schur svd tridiagonal".split())
COMPARISONS = TIES | frozenset("ge gt le lt sign top_k".split())
LINEAR_SUMS = frozenset(
    "dot_general conv_general_dilated reduce_sum cumsum scatter-add scatter_add reduce_window_sum".split()
)


class Traced(NamedTuple):
    """A jaxpr with what makes it another function of the same form: constants, float literals, units of rounding; and
    of each operation that rounds, the share of all comparisons that come before it.
    """

    text: str
    closed: Any
    consts: list[Any]
    literals: np.ndarray
    units: np.ndarray
    depth: np.ndarray


def traced(closed: Any) -> Traced:
    names = [equation.primitive.name for equation in _equations(closed.jaxpr)]
    before = np.cumsum([name in COMPARISONS for name in names])
    units = [unit_of(equation) for equation in _rounded(closed.jaxpr)]
    values = [float(atom.val) for atom in literals(closed.jaxpr)]
    own = any(name in UNENTERED | OPAQUE for name in primitives(closed.jaxpr))  # literals stay inside these
    return Traced(
        text_of(closed) + (str(values) if own else ""),
        closed,
        [lift(const) for const in closed.consts],
        np.asarray(values, np.float64),
        np.asarray(units, np.float64),
        np.asarray([count for name, count in zip(names, before, strict=True) if name not in EXACT]) / max(1, *before),
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Those of the jaxprs that are entered too, in their order."""
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, closed_call(equation)
        if inner is not None:
            yield from _equations(inner.jaxpr)
        elif name == "scan":
            yield from _equations(equation.params["jaxpr"].jaxpr)
        elif name == "cond":
            for branch in equation.params["branches"]:
                yield from _equations(branch.jaxpr)
        else:
            yield equation


def _inlined(jaxpr: Any) -> Iterator[Any]:
    """The equations outside of loops and branches."""
    for equation in jaxpr.eqns:
        inner = closed_call(equation)
        yield from [equation] if inner is None else _inlined(inner.jaxpr)


def _rounded(jaxpr: Any) -> Iterator[Any]:
    """The equations whose results are moved."""
    return (equation for equation in _equations(jaxpr) if equation.primitive.name not in EXACT)


def unit_of(equation: Any) -> float:
    """u = ε / 2 of the dtype that an operation rounds to; 0 for a cast to a longer one.

    A GPU multiplies float32 in TF32, a TPU in bfloat16, unless a precision is set.
    """
    dtypes = [var.aval.dtype for var in equation.outvars if is_inexact(var.aval)]
    if not dtypes:
        return 0.0
    name, u = equation.primitive.name, max(float(jnp.finfo(dtype).eps) / 2 for dtype in dtypes)
    if name == "reduce_precision":
        return float(2.0 ** -(equation.params["mantissa_bits"] + 1))
    if name == "convert_element_type":
        before = equation.invars[0].aval
        return u if is_inexact(before) and float(jnp.finfo(before.dtype).eps) / 2 < u else 0.0
    if name in ("dot_general", "conv_general_dilated") and dtypes[0] == jnp.float32:
        if jax.config.values["jax_default_matmul_precision"] not in ("highest", "float32"):
            return {"cpu": u, "gpu": 2.0**-11}.get(jax.default_backend(), 2.0**-8)
    return 16 * u if name in OPAQUE | LOOPS else u


def with_spread(found: Traced) -> Callable[..., Any]:
    """(consts, leaves, literals, units, least moves of the results, units of the leaves, what a 0 of these counts as,
    noise) ↦ (outputs, the least and the greatest that rounding made of each element), in float64.
    """
    jaxpr = found.closed.jaxpr
    places = {id(equation): n for n, equation in enumerate(_rounded(jaxpr))}
    numbers = {id(atom): n for n, atom in enumerate(literals(jaxpr))}
    met = Counter(map(id, _equations(jaxpr)))
    once = {id(e) for e in _inlined(jaxpr) if e.primitive.name in LINEAR_SUMS and met[id(e)] == 1}

    def run(consts: Any, leaves: Any, values: Array, units: Any, least: Any, own: Any, zero: Any, noise: Array) -> Any:
        def literal(atom: Any) -> Any:
            return values[numbers[id(atom)]] if id(atom) in numbers else atom.val

        fixed, measured = Walk(_fixed, closed_call, literal, UNENTERED), {}

        def measure(equation: Any, inputs: Sequence[Any]) -> list[Any]:
            """As it is; the sizes of a sum outside of loops are kept, they are a second sum as large."""
            if id(equation) in once:
                measured[id(equation)] = _sizes(equation, inputs)
            return _fixed(equation, inputs)

        exact = evaluate(jaxpr, consts, leaves, fixed._replace(apply=measure))

        def draw(noise: Array) -> list[Any]:
            def rounded(equation: Any, inputs: Sequence[Any]) -> list[Any]:
                place = places.get(id(equation))
                if place is not None and equation.primitive.name in FACTORIZATIONS:  # exact for a matrix u ‖A‖ away
                    inputs = [_moved(a, units[place] * _largest(a), noise, place) for a in inputs]
                outputs = _fixed(equation, inputs)
                if place is None:
                    return outputs
                sizes = outputs
                if equation.primitive.name in LINEAR_SUMS:
                    sizes = measured.get(id(equation)) or _sizes(equation, inputs)
                by = [jnp.maximum(units[place] * jnp.abs(b), least[place]) if is_inexact(b) else 0 for b in sizes]
                return [_moved(a, b, noise, place) for a, b in zip(outputs, by, strict=True)]

            by = [own[n] * jnp.where(leaf == 0, zero, jnp.abs(leaf)) for n, leaf in enumerate(leaves)]
            moved = [_moved(a, b, noise, n) for n, (a, b) in enumerate(zip(leaves, by, strict=True))]
            return evaluate(jaxpr, consts, moved, fixed._replace(apply=rounded))

        drawn = lax.map(draw, noise)
        return exact, [jnp.min(a, axis=0) for a in drawn], [jnp.max(a, axis=0) for a in drawn]

    return run


def _moved(a: Any, by: Any, noise: Array, place: int) -> Any:
    """The result of an operation, moved by up to 4 × so much, differently at each place."""
    if not is_inexact(a):
        return a
    if is_complex(a):
        return lax.complex(*(_moved(part, by, noise, place + n) for n, part in enumerate((a.real, a.imag))))
    finite = jnp.where(by < np.inf, by, 0)  # an infinity, such as that of a mask, is not rounded
    return a + (AMPLITUDE * _uniform(noise, a.shape, place) * finite).astype(a.dtype)


def _sizes(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """Σ |A| |B| for a sum Σ A B."""
    return lifted(equation, [jnp.abs(lift(a)) if is_inexact(a) else a for a in inputs])


def _largest(a: Any) -> Any:
    """Of each matrix."""
    return jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)


def _uniform(noise: Array, shape: tuple[int, ...], place: int) -> Array:
    """Other numbers of the noise at each place, the same again where there are not enough."""
    size = int(np.prod(shape))
    start = (place + 1) * 7919 % max(1, NOISE - size)
    if size > NOISE:
        return jnp.tile(noise, -(-size // NOISE))[:size].reshape(shape)
    # noise[start : …] would take ten times as long to trace
    return lax.slice(noise, (start,), (start + size,)).reshape(shape)


def _fixed(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """An equation in float64 as it is, a while loop or shard_map with all that is in it."""
    if equation.primitive.name in UNENTERED:
        return [lift(out) for out in ENTERED[equation.primitive.name](equation, inputs, Walk(_fixed, closed_call))]
    return lifted(equation, inputs)


def exact(closed: Any) -> Callable[[Any], Any]:
    """leaves ↦ outputs, in float64."""
    walk = Walk(_fixed, closed_call, opaque=UNENTERED)
    return lambda leaves: evaluate(closed.jaxpr, [*map(lift, closed.consts)], [*map(lift, leaves)], walk)


@functools.lru_cache(1)
def noise_of(seed: int) -> np.ndarray:
    """Uniform in [−1, 1], a row for each draw."""
    return np.random.default_rng(seed).uniform(-1, 1, (DRAWS, NOISE))
