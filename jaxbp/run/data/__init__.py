"""What is read: data sets by name (dataset.py), tables such as .csv (tables.py), .npz (archive.py, npz.py), folders of
arrays or images (folders.py), OpenML (openml.py), IDX files (idx.py), texts (text.py). What labels become is in
labels.py, what `jaxbp data describe` says in description.py.
"""

from jaxbp.run.data import text
from jaxbp.run.data.archive import Dataset
from jaxbp.run.data.dataset import DataRow, describe, digest, load
from jaxbp.run.data.idx import import_files
from jaxbp.run.data.projection import Projection
from jaxbp.run.data.scaling import Scaling

__all__ = ["DataRow", "Dataset", "Projection", "Scaling", "describe", "digest", "import_files", "load", "text"]
