"""The generated and the real-world subjects are various, repeatable and, against f64 autodiff, right."""

import collections
from typing import Any

import generated
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import real_world
from generated import Subject
from tiers import one_in

import jaxbp

TOLERANCE = (
    1e-11  # relative to a leaf's largest element: f64, a few hundred roundings, some of them of terms that cancel
)


def f64(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float64) if is_float(a) else a, tree)


def is_float(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def float_arguments(args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if jax.tree.leaves(a) and all(map(is_float, jax.tree.leaves(a))))


def split(subject: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """The differentiated arguments' places and all arguments in f64."""
    args = f64(subject.args)
    scalar_function = "gradient" in subject.options or "value_and_grad" in subject.options
    wrt = subject.options.get("wrt", 0 if scalar_function else float_arguments(args))
    return (wrt,) if isinstance(wrt, int) else tuple(wrt), args


def closed(fun: Any, wrt: tuple[int, ...], args: tuple[Any, ...]) -> Any:
    """fun of the differentiated arguments alone."""

    def of_wrt(*some: Any) -> Any:
        every = dict(enumerate(args)) | dict(zip(wrt, some, strict=True))
        return fun(*every.values())

    return of_wrt


def cotangents(out: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> Any:
        if is_float(leaf):
            return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(draw, out)


def gradients(subject: Any, scale: float = 1.0) -> tuple[Any, Any]:
    """Of the rule and of autodiff, in f64, at the subject's own values times `scale`."""
    wrt, args = split(subject)
    options, fun = subject.options, subject.fun
    reference = closed(options.get("reference", getattr(fun, "fun", fun)), wrt, args)
    by_hand = closed(options.get("gradient") or options.get("value_and_grad"), wrt, args)
    forward, backward = options.get("vjp", (None, None))

    @jax.jit
    def both(*point: Any) -> tuple[Any, Any]:
        out, pullback = jax.vjp(reference, *point)
        if "gradient" in options or "value_and_grad" in options:
            got = by_hand(*point)
            return got[1] if "value_and_grad" in options else got, pullback(jnp.ones_like(out))[0]
        cotangent = cotangents(out, 1)
        if forward is not None:
            return backward(closed(forward, wrt, args)(*point)[1], cotangent), pullback(cotangent)
        return jax.vjp(closed(fun, wrt, args), *point)[1](cotangent), pullback(cotangent)

    return both(*(jax.tree.map(lambda a: a * scale, args[i]) for i in wrt))


def worst_error(subject: Any, scale: float = 1.0) -> float:
    return max(oracles.leaf_errors(*gradients(subject, scale)))


def network_gradients(subject: Subject) -> tuple[Any, Any]:
    """A jaxbp network brings no arguments: drawn here."""
    params, x, y = oracles.data(subject.fun, subject.options["seed"] % 1000, 3)
    net = subject.fun

    @jax.jit
    def both(params: Any) -> tuple[Any, Any]:
        return jaxbp.value_and_grad(net, params, x, y)[1], jax.grad(generated._mean_loss(net))(params, x, y)

    return both(params)


def family(subject: Subject) -> str:
    return subject.name.split("/")[0]


SPLIT = [generated.KINKS[name][0] for name in ("maximum-0", "maximum-1", "abs")]  # autodiff: ½, ½ and 1 at the kink


@pytest.mark.parametrize("number", one_in(6, range(60)))
def test_network_agrees_with_autodiff(number: int) -> None:
    subject = generated.network(number, seed=0)
    pair = network_gradients(subject) if isinstance(subject.fun, jaxbp.MLP) else gradients(subject)
    assert max(oracles.leaf_errors(*pair)) < TOLERANCE, subject.name
    assert all(np.any(leaf) for leaf in jax.tree.leaves(pair[1])), f"{subject.name}: a leaf without a gradient"


@pytest.mark.parametrize("number", one_in(4, range(60)))
def test_rule_agrees_with_autodiff(number: int) -> None:
    subject = generated.custom_vjp(number, seed=0)
    if subject.options.get("kinks", "reference") != "reference" or subject.fun in SPLIT:
        subject = subject._replace(args=jax.tree.map(lambda a: jnp.where(a == 0, 2, a), subject.args))
    bounded = subject.options.get("domain") is not None
    for scale in (1.0,) if bounded else (1.0, 200.0, 1e-6):
        assert worst_error(subject, scale) < TOLERANCE, f"{subject.name} at × {scale}"


@pytest.mark.slow
def test_counts_and_variety() -> None:
    networks, rules = list(generated.networks(1000, seed=0)), list(generated.rules(200, seed=0))
    assert (len(networks), len(rules)) == (1000, 200)
    styles = collections.Counter(map(family, networks))
    assert set(styles) == set(generated.STYLES) and min(styles.values()) >= 10
    families = collections.Counter(map(family, rules))
    assert set(families) == set(generated.FAMILIES) and min(families.values()) >= 5
    assert len({s.name for s in networks}) == 1000
    for subjects in (networks, rules):
        assert {s.name.split("/")[-2] for s in subjects} == set(generated.DTYPES)


def test_every_activation_and_loss_appears() -> None:
    nets = [generated._structure(number, 0).net for number in range(generated.STRUCTURES)]
    assert {sigma.name for net in nets for sigma in net.activations} == set(generated.SIGMAS)
    assert {net.loss for net in nets} == set(generated.LOSSES) == set(jaxbp.losses.LOSSES)
    assert {len(net.sizes) - 1 for net in nets} == {1, 2, 3, 4}


@pytest.mark.parametrize("subjects", [generated.networks, generated.rules])
def test_the_seed_decides(subjects: Any) -> None:
    first, again, other = (list(subjects(25, seed)) for seed in (1, 1, 2))
    assert [s.name for s in first] == [s.name for s in again]
    for a, b in zip(first, again, strict=True):
        oracles.assert_same_bits(
            [x for x in jax.tree.leaves(a.args) if is_float(x)], [x for x in jax.tree.leaves(b.args) if is_float(x)]
        )
    assert any(
        not np.array_equal(jax.tree.leaves(a.args)[0], jax.tree.leaves(b.args)[0])
        for a, b in zip(first, other, strict=True)
        if a.args and b.args
    )


@pytest.mark.parametrize("case", real_world.CASES, ids=lambda c: c.name)
def test_real_world_verdict(case: real_world.Case) -> None:
    """The expected verdict is what f64 autodiff of the reference says, large cotangents included."""
    error = worst_error(case)
    assert (error < 1e-9) == (case.expected == "PASS"), f"error {error:.1e}: {case.why}"
