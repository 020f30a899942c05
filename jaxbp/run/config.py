"""A run's configuration: TOML → overrides from the command line → frozen dataclasses, validated by pydantic.

A config is data: nothing in it is executed, names are looked up in tables.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field

from jaxbp.names import Entry, lookup, nearest, short
from jaxbp.run import keys as dotted
from jaxbp.run import overrides
from jaxbp.run.errors import UserError

STRICT = ConfigDict(extra="forbid")  # an unknown key in a table is an error
MOST_BYTES = 10**6  # of a config file; what is larger is not one
MOST_MEMBERS = 10**4  # of a sweep: each has a folder

Kind = Literal["mlp", "lenet5", "conv1d", "mixer", "gpt", "chain"]
KINDS_WITH = {  # the kinds of network that have a key of [model]; all have the others
    **dict.fromkeys(("sizes", "hidden_sizes", "hidden", "output", "bias", "bias_std"), ("mlp",)),
    **{"arguments": ("lenet5", "conv1d", "mixer", "gpt"), "layers": ("chain",)},
}

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=3e38, allow_inf_nan=False)]  # float32 has no larger number
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = bool | int | Finite | str
Argument = Number | dict[str, Finite]
"""An Optax argument; a table maps steps to numbers, as piecewise_constant_schedule takes them."""
Constants = Annotated[dict[Literal["mean", "scale"], Finite], Field(min_length=2)]
"""{mean = 33.3, scale = 78.6}"""
Fraction = Annotated[float, Field(gt=0, lt=1)]
Fold = Annotated[str, Field(pattern=r"^[1-9]\d{0,8}/[1-9]\d{0,8}$")]
"""The second of five: "2/5"."""
Slots = Annotated[dict[Literal["slots"], Count], Field(min_length=1)]
"""{slots = 8}"""
Adaptive = Annotated[dict[Literal["quantile", "learning_rate", "count_noise"], Positive], Field(min_length=1)]
"""{quantile = 0.5}"""
Values = Annotated[tuple[Any, ...], Field(min_length=1)]
Swept = dict[str, Values | Annotated[dict[str, Values], Field(min_length=1)]]
"""Of a table: keys, and those of its arguments, with the list of values that a sweep gives them."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, which part of them is the test set, and how they are scaled."""

    name: str = "digits"
    """digits, iris, wine, breast_cancer, diabetes, mnist, fashion_mnist, text, openml:NAME, or the path of a .txt, an
    .npz with x and y, a table (.csv, .tsv, .parquet, .feather or .arrow), or a folder: x.npy and y.npy, or images in a
    folder a class."""
    test_fraction: Fraction | None = None
    """Part of the samples kept for the test; None: the data set's own test set, or 0.2 where it has none. Of a text its
    end; None: 0.1."""
    validation: Fraction | Fold | None = None
    """Part of the training samples kept to validate with: each epoch is scored on it, and the test set only at the end.
    "2/5": the second of five folds. None: the data set's own x_val and y_val, or no validation set. Of a text what
    comes before the test set."""
    block: Count | None = None
    """Of a text: the characters of a sample; None: 64. Each epoch reads the text once, from another beginning on."""
    seed: Seed = 0
    """Seed of the split into training, validation and test set."""
    standardize: Literal["feature", "global", "none"] | Constants = "feature"
    """Inputs to mean 0 and standard deviation 1: each column, all by one mean and deviation, not at all, or by numbers
    from elsewhere, such as {mean = 33.3, scale = 78.6}."""
    pca: Count | None = None
    """Inputs are projected on so many principal directions, each sample divided by its norm; standardize is then of the
    projections. None: the inputs themselves."""
    standardize_targets: bool = False
    """Regression: targets to mean 0 and standard deviation 1, each column."""
    target: str | tuple[str, ...] | None = None
    """Of a table: the column that is to be learned, or several columns of numbers."""
    drop: tuple[str, ...] = ()
    """Of a table: columns that are left out."""
    missing: Literal["mean"] | None = None
    """Of a table, for missing values: numbers get the mean of the training set, a category one of its own. None: they
    are refused."""
    decimal: Literal[".", ","] = "."
    """Of a .csv or .tsv: the decimal point."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network: `jaxbp.MLP` and `jaxbp.init`, or another one by its kind."""

    sizes: Annotated[tuple[Count, ...], Field(min_length=2, max_length=10_000)] | None = None
    """Widths of the input, of the hidden layers and of the output. None: hidden_sizes between those of the data."""
    hidden_sizes: Annotated[tuple[Count, ...], Field(max_length=10_000)] | None = dataclasses.field(
        default=None, kw_only=True
    )
    """Widths of the hidden layers alone; None: 64, one layer. The config.toml of a run has the sizes instead."""
    hidden: str | tuple[str, ...] = "relu"
    """Activation of the hidden layers: one name for all, or a name a layer."""
    output: str = "identity"
    """Activation of the last layer."""
    loss: str = "softmax_cross_entropy"
    """Loss of one sample."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the label's probability spread over all classes; softmax_cross_entropy only, in training only."""
    scheme: str = "he"
    """Initial weights: he, glorot or lecun (each _normal or _uniform), orthogonal, normal."""
    scheme_std: Positive | None = None
    """Standard deviation of the scheme "normal"; None: 0.01."""
    bias: Literal["zeros", "normal"] = "zeros"
    """Initial biases."""
    bias_std: Positive | None = None
    """Standard deviation of the biases "normal"; None: 0.01."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of parameters and data."""
    kind: Kind = "mlp"
    """mlp has sizes, hidden and output; lenet5, conv1d, mixer and gpt are those of `jaxbp.models`; chain has layers."""
    arguments: dict[str, Number] = dataclasses.field(default_factory=dict)
    """Of lenet5, conv1d, mixer and gpt: their own arguments, such as layers and width, by their names in
    `jaxbp.models`."""
    layers: tuple[dict[str, Any], ...] = ()
    """Of a chain: [[model.layers]] with a kind, such as "conv2d", "layer_norm" or "residual", and its arguments as in
    `jaxbp.layers`."""
    parameters: str | None = None
    """The folder of a run whose parameters this one begins with: the best ones if that run kept them. Every layer has
    to have the same shape."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update. "sgd" without arguments is the lecture's step w ← w − η ∂ℓ/∂w."""

    name: str = "sgd"
    """sgd, or any Optax optimiser by its Optax name."""
    learning_rate: Rate | None = None
    """η; None where a schedule gives it."""
    arguments: dict[str, Number] = dataclasses.field(default_factory=dict)
    """The optimiser's own arguments, by their Optax names."""
    schedule: str | None = None
    """Learning-rate schedule by its Optax name."""
    schedule_arguments: dict[str, Argument] = dataclasses.field(default_factory=dict)
    """The schedule's arguments, by their Optax names; a count of steps may be "15 epochs", or "all" of the run."""
    weight_decay: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    """λ: adds λw, the gradient of ½λ‖w‖², to the gradient of the weights; biases are not decayed."""
    clip_norm: Positive | None = None
    """The gradient is scaled down to this norm when its norm over all parameters is larger."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop and what it writes."""

    epochs: Count = 10
    """Passes over the training set."""
    batch_size: Count = 128
    """Samples a step; the last step of an epoch takes what is left."""
    seed: Seed = 0
    """Of the initial parameters and of the order of the samples."""
    monitor: str | None = None
    """The score of metrics.jsonl whose best epoch is kept, such as validation_accuracy; it needs a validation set.
    None: validation_loss with patience, or else none."""
    patience: Count | None = None
    """Epochs without a better score after which the run stops early; None: it does not."""
    min_delta: NonNegative = 0.0
    """By how much a score has to be better than the best one so far to count."""
    class_weights: Annotated[tuple[Positive, ...], Field(min_length=2)] | Literal["balanced"] | None = None
    """What a sample of each class counts in the mean of its batch: a number a class, or "balanced", so that the classes
    of the training set count alike. The loss that is reported has no weights."""
    memory: Literal["store-all", "sqrt"] | Slots = "store-all"
    """Which layer inputs wait for the backward pass: all, those of √L checkpoints, or {slots = 8}: the best 8."""
    micro_batches: Count = 1
    """Parts that a step's batch is cut into: one is in memory at a time, their gradients are added up."""
    precision: Literal["full", "mixed"] = "full"
    """mixed: forward and backward in bfloat16, parameters and their update in float32."""
    folder: str | None = None
    """Run folder: new, empty, or that of an unfinished run, which goes on; None: runs/<config>, runs/<config>-2 …"""
    plots: bool = True
    """Whether to draw the pictures."""
    plot_format: Literal["png", "svg"] = "png"
    """What the pictures are."""
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Other programs that get files of their own in the run folder: tensorboard, mlflow and wandb, where installed."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Per-sample gradients while training, as lines of metrics.jsonl; nothing by default."""

    quantities: tuple[str, ...] = ()
    """What is recorded of a step's batch, by the names of run/quantities.py, such as squared_norms and noise_scale."""
    every: Count = 100
    """Steps from one record to the next; the first step is recorded."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """Differentially private training; by default a run is not private."""

    max_norm: Positive | None = None
    """C: the gradient of each sample is clipped to this norm. train.batch_size is then the mean size of a batch."""
    adaptive: Adaptive | None = None
    """C is the first norm; then it follows a quantile of the norms. None: it stays."""
    noise_multiplier: Positive | None = None
    """σ: the noise on the sum of a batch has the standard deviation σC. Set it or epsilon."""
    epsilon: Positive | None = None
    """ε that all epochs together may spend; σ follows from it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """δ of the ε that is given or reported; it has to be well below 1 / samples."""
    accountant: Literal["pld", "rdp"] = "pld"
    """How ε is computed: by privacy loss distributions, which is tight, or by Rényi divergences."""
    adjacency: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one"
    """What two training sets differ in that ε makes hard to tell apart."""
    sampling: Literal["poisson"] = "poisson"
    """How a batch is drawn: each sample by itself, with the same chance."""
    pca_noise: Positive | None = None
    """σ of the noise on the sum of products xxᵀ whose principal directions data.pca takes; ε counts it too."""
    per_layer: bool = False
    """Clip the gradient of each of the L layers by itself, to C/√L, so that all together have at most the norm C."""
    unprotected: bool = False
    """Report the loss and scores of the training set and the RMS of δ too, which ε does not cover."""
    seed: Seed | None = None
    """For tests: makes batches and noise reproducible, for whoever knows it too. None: they come from a secret key."""

    @property
    def enabled(self) -> bool:
        """Whether the run is private."""
        return any(value is not None for value in (self.max_norm, self.noise_multiplier, self.epsilon, self.pca_noise))

    @property
    def reported(self) -> tuple[str, ...]:
        """The sets whose scores are reported."""
        return ("test",) if self.enabled and not self.unprotected else ("train", "test")


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The same run for several seeds, learning rates and values of any other key; by default a run is no sweep."""

    seeds: Count = 1
    """How many seeds: train.seed, train.seed + 1, …"""
    learning_rate: tuple[Rate, ...] = ()
    """Learning rates, each with each seed; with a schedule, its peak_value or else init_value."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """k of a k-fold cross-validation: the training samples in k parts, each of them once the validation set. None: it
    is not cross-validated."""
    at_once: Count = 1
    """Members of the sweep that share a step by vmap. 1: the numbers of the separate run, bit for bit; more of them
    round differently and take more memory."""
    data: Swept = dataclasses.field(default_factory=dict)
    """Keys of [data] with a list of values each, such as --sweep.data.standardize global,none."""
    model: Swept = dataclasses.field(default_factory=dict)
    """Keys of [model], such as --sweep.model.sizes '[[64,32,10],[64,64,10]]'."""
    optimizer: Swept = dataclasses.field(default_factory=dict)
    """Keys of [optimizer], such as --sweep.optimizer.name sgd,adam or --sweep.optimizer.arguments.momentum 0.5,0.9."""
    train: Swept = dataclasses.field(default_factory=dict)
    """Keys of [train], such as --sweep.train.batch-size 32,128."""
    study: Swept = dataclasses.field(default_factory=dict)
    """Keys of [study]."""
    privacy: Swept = dataclasses.field(default_factory=dict)
    """Keys of [privacy], such as --sweep.privacy.epsilon 1,2,8; each member spends its own ε."""

    @property
    def enabled(self) -> bool:
        """Whether the run is a sweep."""
        return self.seeds > 1 or self.folds is not None or bool(self.values())

    def values(self) -> dict[str, tuple[Any, ...]]:
        """What is swept besides the seeds, by dotted keys; "none" clears a key, if it is no value of its own."""
        tables = {name: table for name, table in dataclasses.asdict(self).items() if isinstance(table, dict)}
        found: dict[str, tuple[Any, ...]] = {dotted.LEARNING_RATE: self.learning_rate} if self.learning_rate else {}
        for key, values in dotted.flat(tables).items():
            may_be_empty = key != dotted.LEARNING_RATE and _fault(key, None) is None
            empty = None if may_be_empty else "none"
            found[key] = tuple(empty if value in (None, "none") else value for value in values)
        return found


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """From which a run that was stopped goes on, in checkpoints/ of the run folder."""

    every: Count | None = None
    """Epochs from one to the next; None: after the epoch in which a minute has passed since the last one."""
    keep: Count = 2
    """How many of the newest stay."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Several devices, data × model of them; one by default."""

    data: Count | None = None
    """Devices over which the samples of a batch are split; 1 if left out, in several processes all of theirs."""
    model: Count = 1
    """Devices over which the units of the layers are split."""


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    study: StudyConfig = dataclasses.field(default_factory=StudyConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def read(path: Path, options: Sequence[str] = ()) -> Config:
    """The config in a TOML file, changed by command-line options such as ``--train.epochs 3``, see `overrides`.

    Raises:
      UserError: the file is missing or is not TOML; an unknown key, a wrong type, an impossible value. One line: where,
        the dotted key, what was given, what is allowed.
    """
    config = validate(_read_toml(path), source=str(path))
    return override(config, options) if options else config


def override(config: Config, options: Sequence[str]) -> Config:
    """The config with the values of command-line options in the place of its own."""
    return validate(overrides.applied(dataclasses.asdict(config), options, _fits), source="command line")


def validate(values: dict[str, Any], source: str) -> Config:
    """A Config from nested tables; every type and range is checked, no value is converted to another type.

    By way of JSON, because pydantic's strict mode takes a table for a dataclass and an array for a tuple only there.
    """
    try:
        config = _ADAPTER.validate_json(_json(source, _renamed(values)), strict=True)
    except pydantic.ValidationError as error:
        problems = list(dict.fromkeys(_describe(error.errors())))
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise UserError(f"{source}: {problems[0]}{more}") from None
    if fault := _sweep_fault(config.sweep):
        raise UserError(f"{source}: {fault}")
    return config


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """With train.loggers for the train.tensorboard that the config.toml of an earlier run has."""
    train = values.get("train")
    if not isinstance(train, dict) or not isinstance(train.get("tensorboard"), bool):
        return values
    rest = {key: value for key, value in train.items() if key != "tensorboard"}
    return {**values, "train": {"loggers": ["tensorboard"][: train["tensorboard"]], **rest}}


def keys(config: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key, "data.name" … "mesh.model"."""
    fields = [(f"{prefix}{field.name}", field.type) for field in dataclasses.fields(config)]
    nested = [keys(kind, f"{key}.") if dataclasses.is_dataclass(kind) else [key] for key, kind in fields]  # type: ignore[arg-type]
    return [key for group in nested for key in group]


def documented(table: type) -> dict[str, str]:
    """What the class of a table says about each key: the text below it."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(table))).body
    pairs = itertools.pairwise(body.body) if isinstance(body, ast.ClassDef) else ()
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested tables without the keys that are None, which TOML cannot write; `validate` takes them back.

    Without the keys that the kind of network does not have, too.
    """
    tables = dataclasses.asdict(config)
    tables["model"] = {
        k: v for k, v in tables["model"].items() if config.model.kind in KINDS_WITH.get(k, (config.model.kind,))
    }
    tables["sweep"] = {name: _without_none(v) for name, v in tables["sweep"].items() if v not in ({}, None)}
    return {name: {k: v for k, v in table.items() if v is not None} for name, table in tables.items()}


def choose(key: str, kind: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """What a config names, from a table of what there is; UserError for an unknown name."""
    try:
        return lookup(kind, name, table)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def _fits(table: str, key: str, value: Any) -> bool:
    """Whether a key may have this value."""
    return _fault(f"{table}.{key}", value) is None


def _fault(key: str, value: Any) -> str | None:
    """Why a dotted key may not have this value; None where it may."""
    try:
        _ADAPTER.validate_json(_json("command line", dotted.put({}, {key: value})), strict=True)
    except pydantic.ValidationError as error:
        return _describe(error.errors())[0]
    return None


def _sweep_fault(sweep: SweepConfig) -> str | None:
    """What is wrong with the keys that a sweep varies, and their values; None where nothing is."""
    found = sweep.values()
    members = sweep.seeds * (sweep.folds or 1) * math.prod(map(len, found.values()))
    if members > MOST_MEMBERS:
        return f"sweep: {members:,} members, at most {MOST_MEMBERS:,} are allowed"
    if sweep.learning_rate and "learning_rate" in sweep.optimizer:
        return "sweep.optimizer.learning_rate: sweep.learning_rate is the same; leave one of them out"
    if sweep.folds and "validation" in sweep.data:
        return "sweep.data.validation: sweep.folds gives it a fold; leave one of them out"
    if sweep.seeds > 1 and "seed" in sweep.train:
        return "sweep.train.seed: sweep.seeds counts on from train.seed; leave one of them out"
    for key, values in found.items():
        if key in dotted.FIXED:
            return f"sweep.{key}: it can't be swept, for it belongs to the sweep as a whole"
        if fault := next(filter(None, (_fault(key, value) for value in values)), None):
            return f"sweep: {fault}"
        if twice := [value for value in values if values.count(value) > 1]:
            shown = "learning_rate" if values == sweep.learning_rate else key
            return f"sweep.{shown}: {twice[0]} is there twice"
    return None


def _without_none(value: Any) -> Any:
    """A value of a sweep with "none" for None, which TOML cannot write."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return "none" if value is None else value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise UserError(f"{path}: not a file")  # a pipe would be waited for
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: larger than {MOST_BYTES:,} bytes, so it is no config")
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors begin a file with a byte-order mark
    except FileNotFoundError:
        near = nearest(path.stem, (file.stem for file in path.parent.glob("*.toml")), "{}.toml")
        raise UserError(f"{path}: no such file{near}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a TOML file: not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except ValueError as error:  # also an integer of more than 4300 digits
        raise UserError(f"{path}: not a TOML file: {error}") from None


def _json(source: str, values: dict[str, Any]) -> str:
    def encode(value: Any) -> str:
        return json.dumps(value, default=lambda date: {"date": str(date)})

    try:
        return encode(values)
    except RecursionError:
        for table, value in values.items():
            for key, inner in value.items() if isinstance(value, dict) else ():
                try:
                    encode(inner)
                except RecursionError:
                    raise UserError(f"{source}: {table}.{key}: nested too deeply") from None
        raise UserError(f"{source}: nested too deeply") from None


def _describe(errors: Sequence[Any]) -> list[str]:
    """Pydantic's errors as "train.epochs: got 0, input should be greater than or equal to 1", one for each value.

    For a value of several possible types pydantic gives an error for each of them.
    """
    found: dict[str, list[str]] = {}
    tables = {name: list(table) for name, table in dataclasses.asdict(Config()).items()}
    for error in errors:
        if error["type"] == "unexpected_keyword_argument":
            found[overrides.unknown(".".join(map(str, error["loc"])), tables)] = []
        elif error["type"] == "value_error":
            found[f"{_key(error['loc'])}: {error['ctx']['error']}"] = []
        else:
            where = f"{_key(error['loc'])}: got {short(error['input'])}"
            found.setdefault(where, []).append(_allowed(error))
    return [f"{where}, {' or '.join(dict.fromkeys(allowed))}" if allowed else where for where, allowed in found.items()]


def _key(location: Sequence[str | int]) -> str:
    """The dotted key, with the name of an optimiser's argument, without pydantic's names for the members of a union."""
    key = ".".join(map(str, location))
    known = next((k for k in keys() if f"{key}.".startswith(f"{k}.")), key)
    tables = known.endswith("arguments") or known.startswith("sweep.")
    return f"{known}.{location[2]}" if tables and isinstance(location[-1], str) and len(location) > 2 else known


def _allowed(error: Any) -> str:
    if error["type"] == "string_pattern_mismatch":  # that of a fold, the only one
        return 'it should be a fold such as "2/5"'
    text = error["msg"].replace("Input should", "it should").replace("an object", "a table")
    text = re.sub(
        r"^Tuple should have at (least|most) (\d+ items?) after validation, not (\d+)", r"it needs at \1 \2", text
    )
    text = re.sub(r"\d{20,}", lambda number: f"{float(number[0]):g}", text)
    choices = re.findall(r"'(\w+)'", error["ctx"]["expected"]) if error["type"] == "literal_error" else []
    return f"{text}{nearest(str(error['input']), choices)}"


_ADAPTER = pydantic.TypeAdapter(Config)
