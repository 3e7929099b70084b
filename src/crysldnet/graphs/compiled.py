"""numba compilation with an optional cache: functions that can't be cached are recompiled at every start.

Compilation takes seconds, so small inputs run in Python, with bit-identical results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache as once
from multiprocessing import parent_process
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache, NullCache
from numba.core.dispatcher import Dispatcher


def _called_by(function: Callable) -> dict[str, Dispatcher]:
    """Return the compiled functions that a function calls."""
    names = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {name: value for name, value in names.items() if isinstance(value, Dispatcher)}


def _files_of(function: Callable) -> set[str]:
    """Return the files of a function and of all compiled functions that it calls."""
    called = (_files_of(other.py_func) for other in _called_by(function).values())
    return {function.__code__.co_filename}.union(*called)


class _Cache(FunctionCache):
    """numba's cache, ignoring damaged entries and entries that can't be written.

    numba recompiles a function when its own file changes. This cache also does so when the file of a compiled function
    that it calls changes.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        others = sorted(_files_of(function) - {function.__code__.co_filename})
        states = [Path(file).stat() for file in others if Path(file).exists()]
        file = self._cache_file
        file._source_stamp = (file._source_stamp, [(state.st_mtime, state.st_size) for state in states])

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # a damaged pickle may raise anything
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except OSError as error:
            _say_once(str(error))


class _NoCache(NullCache):
    def save_overload(self, *_arguments: Any) -> None:
        _say_once("neither the package's folder nor the home folder can be written")


@once
def _say_once(reason: str) -> None:
    if parent_process() is None:
        print(  # noqa: T201
            f"note: compiled code can't be kept ({reason}), so every start takes some seconds more; "
            "name a folder that you can write to in the environment variable NUMBA_CACHE_DIR",
            file=sys.stderr,
        )


@once
def in_python(compiled: Any) -> Callable:
    """Return the Python code of a compiled function, which calls the Python code of other compiled functions."""
    function = compiled.py_func
    names = dict(function.__globals__)
    names |= {name: in_python(called) for name, called in _called_by(function).items()}
    return FunctionType(function.__code__, names, function.__name__)


class _CompiledLater:
    """Runs in Python until given ``numbers`` numbers in arrays, then compiled."""

    def __init__(self, compiled: Any, numbers: int) -> None:
        self.compiled, self.py_func, self._left = compiled, compiled.py_func, numbers

    def __call__(self, *arguments: Any) -> Any:
        if self._left > 0:
            self._left -= sum(value.size for value in arguments if isinstance(value, np.ndarray))
            if self._left >= 0:
                with np.errstate(all="ignore"):
                    return in_python(self.compiled)(*arguments)
        return self.compiled(*arguments)


def njit(*, cache: bool = False, python_up_to: int = 0, **options: Any) -> Callable[[Callable], Any]:
    """Compile a function with numba.

    Args:
        cache: cache the result for later processes, if possible.
        python_up_to: total size of array arguments handled in Python before compiling. Not for functions called by
            compiled ones.
        options: numba options.
    """

    def compile_(function: Callable) -> Any:
        compiled = numba.njit(**options)(function)
        if cache:
            try:
                compiled._cache = _Cache(function)  # what numba's own cache=True does
            except (RuntimeError, OSError):
                compiled._cache = _NoCache()
        return _CompiledLater(compiled, python_up_to) if python_up_to else compiled

    return compile_
