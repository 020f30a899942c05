"""The run folder: the resolved config, metrics.jsonl, provenance."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import tomli_w

from jaxbp.run.config import Config, to_dict
from jaxbp.run.errors import UserError

PACKAGES = ("jaxbp", "jax", "jaxlib", "numpy", "optax", "scikit-learn")


def create(config: Config, name: str) -> Path:
    """Makes the run folder and writes config.toml and provenance.json into it.

    `train.folder` must be new or empty; without it the folder is the first of runs/<name>, runs/<name>-2, … that does
    not exist, so that no run is overwritten.
    """
    folder = Path(config.train.folder) if config.train.folder is not None else _free(Path("runs"), name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"train.folder: {folder} is not empty; name a new folder or remove it")
        (folder / "config.toml").write_text(tomli_w.dumps(to_dict(config)), encoding="utf-8")
        (folder / "provenance.json").write_text(json.dumps(_provenance(config), indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UserError(
            f"train.folder: {str(folder)!r} can't be written: {getattr(error, 'strerror', error)}"
        ) from None
    return folder


def append(folder: Path, *rows: Mapping[str, Any]) -> None:
    """More lines of metrics.jsonl, on disk on return. NaN and ±inf, which JSON lacks, become null."""
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _free(parent: Path, name: str) -> Path:
    numbered = (parent / (name if n == 1 else f"{name}-{n}") for n in range(1, sys.maxsize))
    return next(folder for folder in numbered if not folder.exists())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _provenance(config: Config) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "git_commit": _git_commit(),
        "seed": {"data": config.data.seed, "train": config.train.seed},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working directory, with "-dirty" behind it; None outside a repository or without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
