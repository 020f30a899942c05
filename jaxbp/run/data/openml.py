"""Data sets of openml.org, by scikit-learn: "openml:iris" is version 1 of a name, "openml:61" a number of OpenML's.

They are tables, see tables.py: nominal attributes are categories, numeric ones numbers. Without [data] target it is the
attribute that OpenML names. What was fetched is kept in the folder openml beside the other data sets.
"""

import dataclasses
from http.client import HTTPException
from typing import Any

from jaxbp.run.config import DataConfig
from jaxbp.run.data import idx
from jaxbp.run.errors import UserError

PREFIX = "openml:"
IF_NOT = "a table of yours, such as a .csv, needs no network"


def is_openml(name: str) -> bool:
    """Whether a data set of this name is one of OpenML's."""
    return name.startswith(PREFIX)


def read(config: DataConfig) -> tuple[Any, DataConfig]:
    """The `pyarrow.Table` of a name; the config, with the target that OpenML names where it has none.

    Raises:
      UserError: no network, no such data set, one that is sparse or has free text.
    """
    from scipy import sparse

    name = config.name.removeprefix(PREFIX)
    found = _fetched(config.name, {"data_id": int(name)} if name.isdecimal() else {"name": name, "version": 1})
    if sparse.issparse(found.data):
        raise UserError(f"data.name: {config.name} is sparse; a dense table is allowed")
    target = config.target or found.details.get("default_target_attribute")
    return _table(found), dataclasses.replace(config, target=target)


def _fetched(name: str, which: dict[str, Any]) -> Any:
    from sklearn.datasets import fetch_openml

    home = idx.folder_of("openml")
    how = {"target_column": None, "as_frame": False, "parser": "liac-arff", "n_retries": 1, "data_home": str(home)}
    try:
        return fetch_openml(**which, **how)
    except (OSError, HTTPException, ValueError) as error:
        if "STRING attributes" in str(error):
            hint = "save it as a .csv and let data.drop leave them out"
            raise UserError(f"data.name: {name} has columns of free text; {hint}") from None
        reason = " ".join(str(error).split())
        raise UserError(f"data.name: {name}: can't be fetched: {reason}; {IF_NOT}") from None


def _table(found: Any) -> Any:
    """The attributes as the columns of a `pyarrow.Table`; NaN is missing."""
    import pyarrow as pa

    columns = {}
    for name, values in zip(found.feature_names, found.data.T, strict=True):
        column = pa.array(values, from_pandas=True)
        if categories := found.categories.get(name):
            column = pa.DictionaryArray.from_arrays(column.cast(pa.int32()), pa.array(categories))
        columns[name] = column
    return pa.table(columns)
