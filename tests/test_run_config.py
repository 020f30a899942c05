"""The config: every way in which a file or an option can be wrong, overrides, and the way back to TOML."""

import collections
import json
import os
import random
import tomllib
import typing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from jaxbp.names import nearest
from jaxbp.run import config as configs
from jaxbp.run.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PrivacyConfig,
    StudyConfig,
    SweepConfig,
    TrainConfig,
    keys,
    read,
    to_dict,
    validate,
)
from jaxbp.run.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def message(call: Callable[[], object]) -> str:
    """The message of the UserError that `call` raises: one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "x.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- a file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # unknown tables and keys
        ("[trian]\nepochs = 1", "unknown key 'trian', did you mean 'train'?"),
        ("epochs = 1", "unknown key 'epochs', did you mean 'train.epochs'?"),
        ("[train]\nepohcs = 1", "unknown key 'train.epohcs', did you mean 'train.epochs'?"),
        ("[train]\ntensorboard = 1", "unknown key 'train.tensorboard': train.loggers takes its place"),
        ("[data]\nstandardise = 'none'", "unknown key 'data.standardise', did you mean 'data.standardize'?"),
        ("networks = 1", "unknown key 'networks'. Allowed: data, model, optimizer, train, "),
        ("[model.sub]\nx = 1", "unknown key 'model.sub'. Allowed: sizes, hidden_sizes, hidden, output, loss, "),
        # wrong types: nothing is converted
        ("train = 1", "train: got 1, it should be a table"),
        ("[train]\nepochs = true", "train.epochs: got True, it should be a valid integer"),
        ("[train]\nepochs = '3'", "train.epochs: got '3', it should be a valid integer"),
        ("[train]\nepochs = 3.0", "train.epochs: got 3.0, it should be a valid integer"),
        ("[train]\nepochs = [3]", "train.epochs: got [3], it should be a valid integer"),
        ("[train]\nplots = 1", "train.plots: got 1, it should be a valid boolean"),
        ("[train]\nplots = 'yes'", "train.plots: got 'yes', it should be a valid boolean"),
        ("[data]\nvalidation = '2 of 5'", "got '2 of 5', it should be a valid number or it should be a fold such as"),
        ("[train]\nfolder = 3", "train.folder: got 3, it should be a valid string"),
        ("[train]\nfolder = 2024-01-01", "train.folder: got {'date': '2024-01-01'}, it should be a valid string"),
        ("[optimizer]\nlearning_rate = true", "optimizer.learning_rate: got True, it should be a valid number"),
        ("[optimizer]\nlearning_rate = '0.1'", "optimizer.learning_rate: got '0.1', it should be a valid number"),
        ("[model]\nsizes = 64", "model.sizes: got 64, it should be a valid array"),
        ("[model]\nhidden = 3", "model.hidden: got 3, it should be a valid string or it should be a valid array"),
        # out of range
        ("[train]\nepochs = 0", "train.epochs: got 0, it should be greater than or equal to 1"),
        ("[train]\nbatch_size = -1", "train.batch_size: got -1, it should be greater than or equal to 1"),
        (f"[train]\nepochs = {10**21}", f"train.epochs: got {10**21}, it should be less than 2147483648"),
        (f"[train]\nseed = {2**32}", f"train.seed: got {2**32}, it should be less than 4294967296"),
        ("[data]\nseed = -1", "data.seed: got -1, it should be greater than or equal to 0"),
        ("[data]\ntest_fraction = 1", "data.test_fraction: got 1, it should be less than 1"),
        ("[data]\ntest_fraction = 0.0", "data.test_fraction: got 0.0, it should be greater than 0"),
        ("[model]\nlabel_smoothing = 1", "model.label_smoothing: got 1, it should be less than 1"),
        ("[model]\nscheme_std = 0", "model.scheme_std: got 0, it should be greater than 0"),
        ("[optimizer]\nlearning_rate = -1", "optimizer.learning_rate: got -1, it should be greater than or equal to 0"),
        ("[optimizer]\nclip_norm = 0", "optimizer.clip_norm: got 0, it should be greater than 0"),
        # not finite
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate: got nan, it should be a finite number"),
        (
            "[optimizer]\nlearning_rate = 1e39",
            "optimizer.learning_rate: got 1e+39, it should be less than or equal to 3e",
        ),
        ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate: got inf, it should be a finite number"),
        (
            "[optimizer]\nweight_decay = 1e308",
            "optimizer.weight_decay: got 1e+308, it should be less than or equal to 10",
        ),
        ("[optimizer]\nweight_decay = -inf", "optimizer.weight_decay: got -inf, it should be a finite number"),
        ("[data]\ntest_fraction = nan", "data.test_fraction: got nan, it should be "),
        ("[optimizer.arguments]\nb1 = nan", "optimizer.arguments.b1: got nan, it should be "),
        # bad choices
        (
            "[model]\ndtype = 'flaot32'",
            "model.dtype: got 'flaot32', it should be 'float32', 'float64' or 'bfloat16', did you mean 'float32'?",
        ),
        ("[model]\nbias = 'zero'", "model.bias: got 'zero', it should be 'zeros' or 'normal', did you mean 'zeros'?"),
        ("[data]\nstandardize = 'features'", "did you mean 'feature'?"),
        # an element of a list or a table
        ("[model]\nsizes = [64]", "model.sizes: got [64], it needs at least 2 items"),
        ("[model]\nsizes = [64, 'a', 10]", "model.sizes: got 'a', it should be a valid integer"),
        ("[model]\nsizes = [64, 0, 10]", "model.sizes: got 0, it should be greater than or equal to 1"),
        ("[model]\nsizes = [64, true, 10]", "model.sizes: got True, it should be a valid integer"),
        ("[model]\nhidden = ['relu', 3]", "model.hidden: got "),
        ("[optimizer.arguments]\nb1 = [1]", "optimizer.arguments.b1: got [1], it should be "),
        (
            "[optimizer.schedule_arguments.boundaries_and_scales]\n10 = 'a'",
            "optimizer.schedule_arguments.boundaries_and_",
        ),
        # not TOML
        ("[data\n", "not a TOML file: Expected ']' at the end of a table declaration (at line 1, column 6)"),
        ("[train]\nepochs = 1\nepochs = 2", "not a TOML file: Cannot overwrite a value (at "),
        (f"[train]\nseed = {'9' * 5000}", "not a TOML file: Exceeds the limit"),
        (b"\xff\xfe", "not a TOML file: not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\x00", "not a TOML file: "),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = written(tmp_path, text)
    said = message(lambda: read(path))
    assert said.startswith(f"{path}: ")
    assert expected in said


def test_several_mistakes_are_counted_values_not_types(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nepochs = 0\nseed = -1\n[model]\nhidden = 3")
    assert message(lambda: read(path)).endswith("(and 2 more)")
    assert "more)" not in message(lambda: validate({"model": {"hidden": 3}}, "x"))


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    path = written(tmp_path, f"[train]\nepochs = '{'x' * 5000}'")
    assert len(message(lambda: read(path)).removeprefix(str(path))) < 150


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert read(written(tmp_path, "")) == Config()


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert read(written(tmp_path, "\ufeff[train]\nepochs = 7")).train.epochs == 7


def test_missing_files(tmp_path: Path) -> None:
    for name in ("digits.toml", "mnist.toml"):
        (tmp_path / name).touch()
    missing = tmp_path / "digit.toml"
    assert message(lambda: read(missing)) == f"{missing}: no such file, did you mean 'digits.toml'?"
    assert message(lambda: read(tmp_path / "iris.toml")) == f"{tmp_path / 'iris.toml'}: no such file"
    missing = tmp_path / "no" / "x.toml"
    assert message(lambda: read(missing)) == f"{missing}: no such file"
    assert message(lambda: read(tmp_path)) == f"{tmp_path}: can't be read: Is a directory"


def test_what_would_be_waited_for_is_refused(tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe.toml", tmp_path / "large.toml"
    os.mkfifo(pipe)
    assert message(lambda: read(pipe)) == f"{pipe}: not a file"
    large.write_text(f"[model]\nsizes = [{'1,' * 10**6}]")
    assert message(lambda: read(large)) == f"{large}: larger than 1,000,000 bytes, so it is no config"
    many = written(tmp_path, f"[model]\nsizes = [{'1,' * 20_000}]")
    assert "model.sizes: got [1, 1, " in message(lambda: read(many))
    assert "at most 10000 items" in message(lambda: read(many))
    many_members = ["--sweep.seeds", "5000", "--sweep.learning-rate", "1,2,3,4"]
    said = message(lambda: configs.override(Config(), many_members))
    assert said == "command line: sweep: 20,000 members, at most 10,000 are allowed"


def test_a_string_is_data_whatever_it_says(tmp_path: Path) -> None:
    code = "__import__('os').mkdir('made')"
    config = read(written(tmp_path, f'[train]\nfolder = "{code}"\n[optimizer.arguments]\nb1 = "{code}"'))
    assert (config.train.folder, config.optimizer.arguments) == (code, {"b1": code})


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        (["--train.epochs", "3"], "train.epochs", 3),
        (["--train.epochs=3"], "train.epochs", 3),
        (["--train.epochs", "3", "--train.epochs", "4"], "train.epochs", 4),
        (["--train.batch-size", "7"], "train.batch_size", 7),
        (["--train.batch_size", "7"], "train.batch_size", 7),
        *[([f"--train.plots={word}"], "train.plots", False) for word in ("false", "False", "no", "NO")],
        (["--train.no-plots"], "train.plots", False),
        *[([f"--train.plots={word}"], "train.plots", True) for word in ("true", "True", "yes")],
        (["--train.plots"], "train.plots", True),
        (["--train.loggers", "mlflow"], "train.loggers", ("mlflow",)),
        (["--train.loggers", "mlflow,wandb"], "train.loggers", ("mlflow", "wandb")),
        (["--train.folder", "there"], "train.folder", "there"),
        (["--train.folder", "my runs, all"], "train.folder", "my runs, all"),
        (["--train.folder", "2024-01-01"], "train.folder", "2024-01-01"),
        (["--train.folder", "3"], "train.folder", "3"),
        (["--train.folder", "a=b"], "train.folder", "a=b"),
        *[([f"--train.folder={word}"], "train.folder", None) for word in ("", "None", "none")],
        (["--optimizer.learning-rate", "1e-3"], "optimizer.learning_rate", 1e-3),
        (["--optimizer.learning-rate", ".5"], "optimizer.learning_rate", 0.5),
        (["--optimizer.learning-rate", "None"], "optimizer.learning_rate", None),
        (["--model.sizes", "4", "5", "3"], "model.sizes", (4, 5, 3)),
        *[(["--model.sizes", text], "model.sizes", (4, 5, 3)) for text in ("4,5,3", "[4, 5, 3]", "4, 5, 3", "4 5 3")],
        (["--model.hidden", "tanh"], "model.hidden", "tanh"),
        *[(["--model.hidden", text], "model.hidden", ("tanh", "relu")) for text in ("tanh,relu", "[tanh, relu]")],
        (["--model.hidden", "tanh", "relu"], "model.hidden", ("tanh", "relu")),
        (["--model.hidden", "[tanh]"], "model.hidden", ("tanh",)),
        (["--model.dtype", "float64"], "model.dtype", "float64"),
        (["--study.quantities", "grand"], "study.quantities", ("grand",)),
        (["--study.quantities="], "study.quantities", ()),
        *[
            (["--train.memory", *text.split(" ")], "train.memory", {"slots": 3})
            for text in ("slots=3", "{slots=3}", "{slots = 3}", "slots 3")
        ],
        (["--train.memory.slots", "3"], "train.memory", {"slots": 3}),
        (["--optimizer.arguments={}"], "optimizer.arguments", {}),
        (["--optimizer.arguments.momentum="], "optimizer.arguments", {}),
        (["--optimizer.arguments.momentum", "none"], "optimizer.arguments", {}),
        (["--optimizer.arguments.b1=0.5"], "optimizer.arguments", {"momentum": 0.9, "b1": 0.5}),
        (["--optimizer.arguments.momentum=0"], "optimizer.arguments", {"momentum": 0}),
        (["--optimizer.arguments.mu-dtype=bfloat16"], "optimizer.arguments", {"momentum": 0.9, "mu_dtype": "bfloat16"}),
        *[
            (["--optimizer.arguments", *text.split(" ")], "optimizer.arguments", {"b1": 0.5, "nesterov": True})
            for text in (
                "b1 0.5 nesterov True",
                "b1=0.5 nesterov=yes",
                "b1=.5,nesterov=True",
                "b1 = 0.5, nesterov = true",
                "{b1 = 0.5, nesterov = true}",
            )
        ],
        (
            ["--optimizer.schedule-arguments.boundaries-and-scales.100=0.1"],
            "optimizer.schedule_arguments",
            {"boundaries_and_scales": {"100": 0.1}},
        ),
        (["--optimizer.schedule-arguments.decay-steps", "900"], "optimizer.schedule_arguments", {"decay_steps": 900}),
        (["--data.test-fraction", "0.25"], "data.test_fraction", 0.25),
        (["--sweep.learning-rate", "0.1"], "sweep.learning_rate", (0.1,)),
        (["--sweep.optimizer.name", "sgd,adam"], "sweep.optimizer", {"name": ("sgd", "adam")}),
        (["--sweep.optimizer.name", "sgd"], "sweep.optimizer", {"name": ("sgd",)}),
        (["--sweep.model.sizes", "[[64,10],[64,8,10]]"], "sweep.model", {"sizes": ([64, 10], [64, 8, 10])}),
        (["--sweep.optimizer.arguments.b1=0.8, 0.9"], "sweep.optimizer", {"arguments": {"b1": (0.8, 0.9)}}),
        (["--sweep.train.epochs", "1 2", "--sweep.train.epochs="], "sweep.train", {}),
    ],
)
def test_overrides(tmp_path: Path, options: list[str], key: str, expected: object) -> None:
    path = written(
        tmp_path, "[train]\nfolder = 'here'\nseed = 5\n[optimizer]\nlearning_rate = 0.1\narguments = {momentum = 0.9}"
    )
    config = read(path, options)
    table, name = key.split(".")
    value = getattr(getattr(config, table), name)
    assert repr(value) == repr(expected)
    changed = to_dict(config)
    changed[table].pop(name, None)
    unchanged = to_dict(read(path))
    unchanged[table].pop(name, None)
    assert changed == unchanged


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--train.epohcs", "3"], "unknown key 'train.epohcs', did you mean 'train.epochs'?"),
        (["--epochs", "3"], "unknown key 'epochs', did you mean 'train.epochs'?"),
        (["--trian.epochs", "3"], "unknown key 'trian.epochs', did you mean 'train.epochs'?"),
        (["--train.no-plot"], "unknown key 'train.no_plot', did you mean 'train.plots'?"),
        (["--foo"], "unknown key 'foo'. Allowed: data, model, optimizer, "),
        (["--verbose"], "unknown key 'verbose'. Allowed: data, model, optimizer, "),
        (["--train.epochs", "x"], "train.epochs: got 'x', it should be a valid integer"),
        (["--train.epochs", "1.5"], "train.epochs: got 1.5, it should be a valid integer"),
        (["--train.epochs"], "--train.epochs: a value is missing"),
        (["--train.epochs", "--train.seed", "1"], "--train.epochs: a value is missing"),
        (["--train.epochs="], "train.epochs: got None, it should be a valid integer"),
        (["--train.epochs", "0"], "train.epochs: got 0, it should be greater than or equal to 1"),
        (["--train.plots", "maybe"], "train.plots: got 'maybe', it should be a valid boolean"),
        (
            ["--optimizer.learning-rate", "-1"],
            "optimizer.learning_rate: got -1, it should be greater than or equal to 0",
        ),
        (["--optimizer.learning-rate", "nan"], "optimizer.learning_rate: got nan, it should be a finite number"),
        (["--model.sizes", "4"], "model.sizes: got 4, it should be a valid array"),
        (["--model.sizes", "4,x"], "model.sizes: got 'x', it should be a valid integer"),
        (
            ["--model.dtype", "float16"],
            "model.dtype: got 'float16', it should be 'float32', 'float64' or 'bfloat16', did",
        ),
        (["extra"], "unknown argument 'extra', see --help"),
        (["-x"], "unknown argument '-x', see --help"),
        (["--train.epochs", "3", "-x"], "unknown argument '-x', see --help"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, options: list[str], expected: str) -> None:
    said = message(lambda: read(written(tmp_path, ""), options))
    assert said.startswith("command line: ")
    assert expected in said


SOME = (
    "3",
    "0.1",
    "-1",
    "none",
    "yes",
    "",
    "relu",
    "[1,2]",
    "[",
    "{",
    "{a=1}",
    "a=1",
    "=",
    ",",
    "1,2",
    "x" * 300,
    "'",
    '"',
)
SOME = (
    *SOME,
    "\x00",
    "\udc80",
    "\n[a]",
    "é·ℓ",
    "1e999",
    "9" * 5000,
    "[" * 2000,
    "{a=" * 500,
    "2024-01-01",
    "-",
    "--",
    "$(ls)",
)


@pytest.mark.slow
def test_500_random_overrides_end_in_a_config_or_in_one_line() -> None:
    draw = random.Random(0)
    names = [
        *keys(),
        "train",
        "optimizer.arguments.b1",
        "optimizer.schedule_arguments.a.b",
        "train.epochs.x",
        "x",
        ".",
        "",
    ]
    outcomes = collections.Counter[str]()
    for _ in range(500):
        options = []
        for _ in range(draw.randint(1, 2)):
            key = draw.choice(names)
            if draw.random() < 0.2:
                key = key.replace(draw.choice("abcdefgh."), draw.choice(("-", "", "no-", "é")), 1)
            values = draw.choices(SOME, k=draw.choice((0, 1, 1, 1, 2, 3)))
            options += (
                [f"--{key}={values[0]}", *values[1:]] if values and draw.random() < 0.5 else [f"--{key}", *values]
            )
        try:
            assert isinstance(configs.override(Config(), options), Config)
            outcomes["config"] += 1
        except UserError as error:
            assert str(error).startswith("command line: ") and "\n" not in str(error), options
            assert len(str(error)) < 500, options
            outcomes["line"] += 1
    assert outcomes["config"] > 30 and outcomes["line"] > 30


# --- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_are_valid_and_come_back(path: Path, tmp_path: Path) -> None:
    config = read(path)
    assert config.model.sizes is None or config.model.sizes[0] in (4, 10, 13, 30, 64, 784)
    assert read(written(tmp_path, tomli_w.dumps(to_dict(config)))) == config


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
RATE = st.floats(0, 3e38)
COUNT = st.integers(1, 2**31 - 1)
SEED = st.integers(0, 2**32 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NUMBER = st.booleans() | st.integers(-(2**62), 2**62) | FINITE | TEXT
OF_ALL = {
    "loss": TEXT,
    "label_smoothing": st.floats(0, 1, exclude_max=True),
    "scheme": TEXT,
    "scheme_std": optional(POSITIVE),
    "dtype": st.sampled_from(["float32", "float64", "bfloat16"]),
    "parameters": optional(TEXT),
}
OF_MLP = {
    "sizes": optional(st.lists(COUNT, min_size=2, max_size=4).map(tuple)),
    "hidden_sizes": optional(st.lists(COUNT, max_size=3).map(tuple)),
    "hidden": TEXT | st.lists(TEXT, max_size=3).map(tuple),
    "output": TEXT,
    "bias": st.sampled_from(["zeros", "normal"]),
    "bias_std": optional(POSITIVE),
}
MODEL = st.fixed_dictionaries(
    {**OF_ALL, **OF_MLP, "kind": st.just("mlp"), "arguments": st.just({}), "layers": st.just(())}
)
OTHER_MODEL = st.fixed_dictionaries(
    {
        **OF_ALL,
        **{name: st.just(getattr(ModelConfig(), name)) for name in OF_MLP},
        "kind": st.sampled_from(["lenet5", "conv1d", "mixer", "gpt"]),
        "arguments": st.dictionaries(TEXT, NUMBER, max_size=3),
        "layers": st.just(()),
    }
)
# Dictionaries, because beartype, which checks what the dataclasses are made of, draws from `random`: no strategy may.
TABLES = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {
                "name": TEXT,
                "test_fraction": optional(st.floats(0.01, 0.99)),
                "validation": optional(st.floats(0.01, 0.99) | st.just("2/5")),
                "seed": SEED,
                "standardize": st.sampled_from(["feature", "global", "none", {"mean": 0.5, "scale": 2.0}]),
                "standardize_targets": st.booleans(),
                "pca": optional(COUNT),
                "block": optional(COUNT),
                "target": optional(TEXT | st.lists(TEXT, max_size=2).map(tuple)),
                "drop": st.lists(TEXT, max_size=2).map(tuple),
                "missing": st.sampled_from([None, "mean"]),
                "decimal": st.sampled_from([".", ","]),
            }
        ),
        "model": MODEL | OTHER_MODEL,
        "optimizer": st.fixed_dictionaries(
            {
                "name": TEXT,
                "learning_rate": optional(RATE),
                "arguments": st.dictionaries(TEXT, NUMBER, max_size=3),
                "schedule": optional(TEXT),
                "schedule_arguments": st.dictionaries(
                    TEXT, NUMBER | st.dictionaries(TEXT, FINITE, max_size=2), max_size=3
                ),
                "weight_decay": st.floats(0, 1e9),
                "clip_norm": optional(POSITIVE),
            }
        ),
        "train": st.fixed_dictionaries(
            {
                "epochs": COUNT,
                "batch_size": COUNT,
                "seed": SEED,
                "monitor": optional(TEXT),
                "patience": optional(COUNT),
                "min_delta": st.floats(0, 1e9),
                "class_weights": optional(st.just("balanced") | st.lists(POSITIVE, min_size=2, max_size=3).map(tuple)),
                "memory": st.sampled_from(["store-all", "sqrt"]) | st.fixed_dictionaries({"slots": COUNT}),
                "micro_batches": COUNT,
                "precision": st.sampled_from(["full", "mixed"]),
                "folder": optional(TEXT),
                "plots": st.booleans(),
                "loggers": st.lists(st.sampled_from(["tensorboard", "mlflow", "wandb"]), max_size=2).map(tuple),
                "plot_format": st.sampled_from(["png", "svg"]),
            }
        ),
        "mesh": st.fixed_dictionaries({"data": COUNT, "model": COUNT}),
        "study": st.fixed_dictionaries({"quantities": st.lists(TEXT, max_size=3).map(tuple), "every": COUNT}),
        "privacy": st.fixed_dictionaries(
            {
                **dict.fromkeys(("max_norm", "noise_multiplier", "epsilon", "pca_noise"), optional(POSITIVE)),
                "delta": st.floats(1e-9, 0.1),
                "accountant": st.sampled_from(["pld", "rdp"]),
                "adjacency": st.sampled_from(["add-or-remove-one", "replace-one"]),
                "sampling": st.just("poisson"),
                "per_layer": st.booleans(),
                "adaptive": optional(st.fixed_dictionaries({"quantile": POSITIVE})),
                "unprotected": st.booleans(),
                "seed": optional(SEED),
            }
        ),
        "sweep": st.fixed_dictionaries(
            {
                "seeds": st.integers(1, 30),  # times 96 settings and 3 folds at most: 10,000 members are allowed
                "folds": optional(st.integers(2, 3)),
                "learning_rate": st.lists(RATE, max_size=3, unique=True).map(tuple),
                "at_once": COUNT,
                "data": st.just({"standardize": ("none", "global")}) | st.just({}),
                "model": st.just({"sizes": ([4, 3], [4, 8, 3])}) | st.just({}),
                "optimizer": st.just({"arguments": {"momentum": (0.5, 0.9)}, "clip_norm": ("none", 1.0)}),
                "train": st.just({}),
                "study": st.just({}),
                "privacy": st.just({"epsilon": (1.0, 8.0)}) | st.just({}),
            }
        ),
        "checkpoint": st.fixed_dictionaries({"every": optional(COUNT), "keep": COUNT}),
    }
)


@pytest.mark.slow
@given(TABLES)
def test_every_config_comes_back(tables: dict[str, dict[str, Any]]) -> None:
    kinds = {
        **{"data": DataConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "train": TrainConfig},
        **{
            "study": StudyConfig,
            "privacy": PrivacyConfig,
            "sweep": SweepConfig,
            "checkpoint": CheckpointConfig,
            "mesh": MeshConfig,
        },
    }
    assert {f"{table}.{name}" for table, values in tables.items() for name in values} == set(keys())
    config = Config(**{name: kind(**tables[name]) for name, kind in kinds.items()})
    again = validate(tomllib.loads(tomli_w.dumps(to_dict(config))), "x")
    assert again == config
    # 1, 1.0 and True are equal and not the same; TOML has its tables last, so the order of keys is not kept.
    assert json.dumps(asdict(again), sort_keys=True) == json.dumps(asdict(config), sort_keys=True)


def test_the_config_of_an_earlier_run_is_read() -> None:
    for tensorboard in (True, False):
        config = validate({"train": {"tensorboard": tensorboard, "epochs": 3}}, "x")
        assert (config.train.loggers, config.train.epochs) == (("tensorboard",) * tensorboard, 3)


def test_keys_are_the_fields() -> None:
    assert keys()[0] == "data.name" and keys()[-1] == "mesh.model"
    assert {key.split(".")[0] for key in keys()} == set(to_dict(Config()))
    assert (
        len(keys())
        == len(set(keys()))
        == sum(len(c.__dataclass_fields__) for c in typing.get_type_hints(Config).values())
    )


@pytest.mark.parametrize(
    ("given", "allowed", "said"),
    [
        ("ReLU", ("elu", "relu"), "relu"),
        ("LeakyReLU", ("relu", "leaky_relu"), "leaky_relu"),
        ("xavier", ("he_normal", "glorot"), "glorot"),
        ("Xavier_Uniform", ("he_uniform", "glorot_uniform"), "glorot_uniform"),
        ("MSE", ("squared_error", "huber"), "squared_error"),
        ("cosine", ("linear_schedule", "cosine_decay_schedule"), "cosine_decay_schedule"),
        ("learning-rate", ("learning_rate",), "learning_rate"),
        ("xavier", ("zeros", "normal"), ""),  # what it is called here is not allowed there
        ("cube", ("sigmoid", "relu"), ""),
        ("loss", ("noise_scale", "el2n"), ""),
        ("networks", ("mesh", "model"), ""),
        ("", ("a", "b"), ""),
        ("x" * 10**6, ("a", "b"), ""),
    ],
)
def test_a_suggestion_only_when_it_is_near(given: str, allowed: tuple[str, ...], said: str) -> None:
    assert nearest(given, allowed) == (f", did you mean {said!r}?" if said else "")


def test_choose_names_key_value_nearest_and_what_is_allowed() -> None:
    said = message(lambda: configs.choose("a.b", "colour", "gren", {"red": 1, "green": 2}))
    assert said == "a.b: unknown colour 'gren', did you mean 'green'? Allowed: red, green"
