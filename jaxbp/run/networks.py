"""The network of a [model] table, for the samples that it is to take."""

import dataclasses
import inspect
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxbp import activations, layers, losses
from jaxbp.layers import Chain, Embedding, Residual, Tied
from jaxbp.losses import Loss
from jaxbp.mlp import MLP
from jaxbp.models import MODELS
from jaxbp.names import lookup
from jaxbp.network import Net, Network, tokens_of
from jaxbp.run.config import KINDS_WITH, ModelConfig, choose
from jaxbp.run.errors import UserError

LAYERS = {
    re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower(): getattr(layers, name)
    for name in layers.__all__
    if name not in ("Chain", "Conv", "Layer", "Tied")
}
"""What a table of [[model.layers]] may name as its kind: conv2d, layer_norm …"""
HIDDEN_SIZES = (64,)  # of a config that names no sizes


class Sample(NamedTuple):
    """What a network is to take: the shape of an input as it was read, how many outputs, whether a label a position."""

    shape: tuple[int, ...]
    outputs: int
    positions: bool


def sized(config: ModelConfig, sample: Sample) -> ModelConfig:
    """With the `sizes` of an MLP, whose ends the sample has where the config has none."""
    if config.sizes and config.hidden_sizes is not None:
        raise UserError("model.hidden_sizes: model.sizes has them, too: leave out one of the two")
    if config.kind != "mlp" or config.sizes:
        return config
    hidden = HIDDEN_SIZES if config.hidden_sizes is None else config.hidden_sizes
    return dataclasses.replace(config, sizes=(math.prod(sample.shape), *hidden, sample.outputs), hidden_sizes=None)


def network(config: ModelConfig, sample: Sample | None = None) -> Net:
    """The network of a [model] table: an MLP of its `sizes`, another one for the sample, see `sized`.

    Raises:
      UserError: an unknown name, an argument that there isn't, layers that do not fit each other or the sample.
    """
    loss = _loss(config)
    choose("model.output", "activation", config.output, activations.ACTIVATIONS)
    for name in (config.hidden,) if isinstance(config.hidden, str) else config.hidden:
        choose("model.hidden", "activation", name, activations.ACTIVATIONS)
    _check_keys(config)
    try:
        if config.kind == "mlp":
            return MLP(config.sizes or (), config.hidden, config.output, loss)
        assert sample is not None, config.kind  # an MLP alone names all of its sizes
        if config.kind == "chain":
            chain = Chain(*(_layer(f"layers[{i}]", table) for i, table in enumerate(config.layers, 1)))
            loss = losses.over_positions(loss) if sample.positions else loss
            return Network(chain, loss, _shape(config, chain, sample))
        build = MODELS[config.kind]
        arguments = _arguments(config.kind, build, config.arguments, skipped=3)
        return build(_shape(config, None, sample), sample.outputs, loss, **arguments)
    except (ValueError, TypeError) as error:
        key = {"mlp": "hidden", "chain": "layers"}.get(config.kind, "kind")
        raise UserError(f"model.{key}: {error}") from None


def takes_tokens(net: Net) -> bool:
    """Whether the first layer is an embedding, so that inputs are integers and are not scaled."""
    return tokens_of(net) > 0


def title(net: Net, config: ModelConfig) -> str:
    """In a few words: "64-32×3-10 relu" of an MLP, or "lenet5"."""
    if not isinstance(net, MLP):
        return " ".join([config.kind, *(f"{name} {value}" for name, value in config.arguments.items())])
    hidden = "/".join(dict.fromkeys(sigma.name for sigma in net.activations[:-1]))
    return f"{shown_sizes(net.sizes)} {hidden}"


def shown_sizes(sizes: tuple[int, ...]) -> str:
    """Widths, those that repeat more than twice counted: "64-32×3-10"."""
    runs = [list(map(str, run)) for _, run in itertools.groupby(sizes)]
    return "-".join(f"{run[0]}×{len(run)}" if len(run) > 2 else "-".join(run) for run in runs)


def _loss(config: ModelConfig) -> str | Loss:
    choose("model.loss", "loss", config.loss, losses.LOSSES)
    if config.label_smoothing and config.loss != "softmax_cross_entropy":
        raise UserError(f"model.label_smoothing: only softmax_cross_entropy has it, the loss is {config.loss}")
    smoothing = config.label_smoothing
    return losses.smoothed_softmax_cross_entropy(smoothing) if smoothing else config.loss


def _check_keys(config: ModelConfig) -> None:
    default = ModelConfig()
    for key, kinds in KINDS_WITH.items():
        if config.kind not in kinds and getattr(config, key) != getattr(default, key):
            raise UserError(f'model.{key}: kind "{config.kind}" has none, allowed with: {", ".join(kinds)}')
    if config.kind == "chain" and not config.layers:
        such = '[[model.layers]] with kind = "dense", size = 10'
        raise UserError(f'model.layers: kind "chain" needs layers, such as {such}')


def _shape(config: ModelConfig, chain: Chain | None, sample: Sample) -> tuple[int, ...]:
    """Of an input as the network takes it: images get a channel, and so do signals for convolutions."""
    if sample.positions or (chain is not None and isinstance(chain.layers[0], Embedding | Tied)):
        return sample.shape
    signal = config.kind == "conv1d" and len(sample.shape) == 1
    image = config.kind != "conv1d" and len(sample.shape) == 2
    return (*sample.shape, 1) if signal or image else sample.shape


def _layer(where: str, table: Any) -> Any:
    """A layer of a table such as {kind = "dense", size = 10}; "residual" has `layers` of its own."""
    if not isinstance(table, Mapping) or not isinstance(table.get("kind"), str):
        raise ValueError(f'{where} needs a kind, such as kind = "dense"')
    kind = lookup(f"kind of {where}", table["kind"], LAYERS)
    rest = {key: value for key, value in table.items() if key != "kind"}
    if kind is Residual:
        if list(rest) != ["layers"] or not isinstance(rest["layers"], list | tuple):
            raise ValueError(f"{where}: residual takes layers, a list of layers")
        return Residual(Chain(*(_layer(f"{where}.layers[{i}]", inner) for i, inner in enumerate(rest["layers"], 1))))
    return kind(**_arguments(where, kind, {k: tuple(v) if isinstance(v, list) else v for k, v in rest.items()}))


def _arguments(where: str, build: Any, given: Mapping[str, Any], skipped: int = 0) -> dict[str, Any]:
    """The arguments, looked at; those that are skipped aren't the config's."""
    named = list(inspect.signature(build).parameters.values())[skipped:]
    allowed = {parameter.name: parameter for parameter in named if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
    for name in given:
        lookup(f"argument of {where}", name, allowed)
    for name, parameter in allowed.items():
        if parameter.default is parameter.empty and name not in given:
            raise ValueError(f"{where} needs {name}")
    return dict(given)
