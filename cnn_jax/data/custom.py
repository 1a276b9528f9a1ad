"""Images from a function in the user's own file: `data.name=my_file.py:function`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cnn_jax import user_code
from cnn_jax.config import DataConfig
from cnn_jax.data.dataset import Decoded, Source, Split
from cnn_jax.errors import UserError, nearest

_PARTS = ("train", "validation", "test")


def source(config: DataConfig) -> Source:
    """Returns the images of the function that `config.name` names; they are not cached.

    The function gets the DataConfig and returns `{"class_names": [...], "train": (images, labels)}`
    and optionally "validation" and "test": images uint8 [n, height, width, 3], labels integers [n].

    Raises:
        UserError: there is no such file or function.
    """
    function = user_code.load(config.name)
    if not callable(function):
        raise UserError(f"data.name={config.name} is not a function")
    return Source(
        name=config.name,
        identity=config.name,
        fingerprint="",
        description=config.name,
        decode=lambda: _decode(function(config), config.name),
    )


def _decode(returned: Any, where: str) -> Decoded:
    if not isinstance(returned, Mapping) or not {"class_names", "train"} <= set(returned):
        raise UserError(
            f"{where} must return a dict with the keys class_names and train, and optionally "
            "validation and test"
        )
    for key in returned:
        if key not in ("class_names", *_PARTS):
            raise UserError(f"{where} returned an unknown key {key}{nearest(str(key), _PARTS)}")
    parts = {p: _part(returned[p], f"{where}, {p}") for p in _PARTS if p in returned}
    return Decoded(tuple(str(name) for name in returned["class_names"]), parts)


def _part(pair: Any, where: str) -> Split:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UserError(f"{where}: not a pair (images, labels)")
    images, labels = np.asarray(pair[0]), np.asarray(pair[1])
    if np.issubdtype(labels.dtype, np.integer):
        # Labels that int32 can't hold become -1, and the check of all data refuses these.
        labels = np.where(labels == labels.astype(np.int32), labels, -1).astype(np.int32)
    return Split(images, labels)
