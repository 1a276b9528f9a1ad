"""Objects in the user's own files: "my_file.py:name" names a config, network, loss, hook, ..."""

import hashlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from cnn_jax.errors import UserError, nearest, one_line
from cnn_jax.values import is_user_code

_MODULES: dict[Path, ModuleType] = {}
_HASHES: dict[str, str] = {}


def load(text: str) -> Any:
    """Returns the object that "path/to/my_file.py:name" names.

    A relative path starts from the current folder. A file is executed only once, so the same text
    gives the same object every time.

    Raises:
        UserError: the file is missing, raises an exception, or does not define the name.
    """
    if not is_user_code(text):
        raise UserError(f"{text}: expected FILE.py:NAME")
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{text}: {file} does not exist")
    if path not in _MODULES:
        _MODULES[path] = _execute(path, text)
    module = _MODULES[path]
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{text}: {file} has no {name}{nearest(name, names)}")
    return getattr(module, name)


def hashes() -> dict[str, str]:
    """Returns the SHA-256 of each file that was executed, by its absolute path."""
    return dict(_HASHES)


def _execute(path: Path, text: str) -> ModuleType:
    # Registered, because dataclasses and pickle look a class up in its module by name.
    module = ModuleType(f"cnn_jax_user_code_{len(_MODULES)}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        source = path.read_bytes()
        exec(compile(source, path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise UserError(f"{text}: {_where(error, path)}{one_line(error)}") from None
    _HASHES[str(path)] = hashlib.sha256(source).hexdigest()
    return module


def _where(error: BaseException, path: Path) -> str:
    """Returns "line N: KindOfError: " for the last line of the file that led to an error."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno}: {kind}: "
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"line {lines[-1]}: {kind}: " if lines else f"{kind}: "
