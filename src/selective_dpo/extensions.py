"""What users add by name: tables of registered things, which also take `module:name` of a user's own file."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from selective_dpo.errors import ConfigError
from selective_dpo.storage.artifacts import file_digest

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Name -> what is registered by it. `registry["my_module:my_function"]` imports and adds it.

    The import is by name in each process, so launched processes and workers find the same thing.

    Raises:
        ConfigError: looking up a name that is not registered, or `module:name` that cannot be imported.
    """

    def __init__(self, what: str, adopt: Callable[[str, Any], T]) -> None:
        """`what` is registered here, in messages; `adopt` makes an entry of a name and what it names."""
        super().__init__()
        self._what, self._adopt = what, adopt

    def __missing__(self, name: str) -> T:
        if ":" not in name:
            raise ConfigError(
                f"no {self._what} is called {name!r}; use {', '.join(self)}, or module:name of your own file"
            )
        self[name] = self._adopt(name, import_named(name))
        return self[name]


def import_named(name: str) -> Any:
    """What `module:name` names; the module is a file of the current folder, or installed.

    Raises:
        ConfigError: there is no such module or nothing of that name in it, or the module raises an error.
    """
    module, _, attribute = name.partition(":")
    # The command's own folder is not searched where it was started as `selective-dpo`. It comes last, so
    # that a file there cannot stand in for a library.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise ConfigError(
            f"{name} cannot be imported ({type(error).__name__}: {lines[0]}): start in the folder "
            f"of {module.replace('.', '/')}.py, or install the module"
        ) from error


def source_digest(thing: Any) -> str:
    """SHA-256 of the file that defines a function or class; of its own source where it is in no file.

    What that file imports is not in it.

    Raises:
        ConfigError: its source cannot be read.
    """
    try:
        path = Path(inspect.getsourcefile(thing) or "")
        if path.is_file():
            return file_digest(path)
        return hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()
    except (OSError, TypeError) as error:
        raise ConfigError(f"{thing!r} has no source to tell it by: define it in a file") from error
