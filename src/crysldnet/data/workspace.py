"""The work of an import: pieces that are read in processes, and the folder that keeps what was read.

Each piece is written into the folder as it is finished. An import that was killed finds them there when it is started
again with the same input, and reads only the others.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import pyarrow as pa

from crysldnet.errors import DataError

Task = Callable[[], pa.Table]
"""Reads one piece; it travels to another process, so it is a ``functools.partial`` of a module's function."""

T = TypeVar("T")

PATIENCE = 2.0
"""seconds; what takes less is read sooner in one process than it takes to start others"""


class Workspace:
    """The folder of an import's pieces, beside its output; a context manager that holds it against others.

    Args:
        out: the output, after which the folder is named.
        stamp: what tells whether an earlier import's pieces are of the same input; None where nothing can.
    """

    def __init__(self, out: Path, stamp: Any) -> None:
        self.folder = out.with_name(f".{out.name}.pieces")
        self._stamp = json.dumps(stamp) if stamp is not None else None
        self._lock: IO[str] | None = None

    def __enter__(self) -> Workspace:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
            _lock(self._lock)
            plan = self.folder / "input.json"
            if self._stamp is None or not plan.exists() or plan.read_text() != self._stamp:
                for left in self.folder.glob("*.arrow*"):
                    left.unlink()
                plan.write_text(self._stamp or "")
        except BlockingIOError as error:
            raise DataError(f"another import is writing to {self.folder.parent / self.folder.name[1:-7]}") from error
        except OSError as error:
            raise DataError(f"can't write to {self.folder.parent}: {error.strerror}") from error
        return self

    def piece(self, number: int) -> Path:
        """Return the file of a piece."""
        return self.folder / f"{number:07}.arrow"

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stamp is None:  # nothing could tell that the pieces are of the same input
            self.remove()
        if self._lock is not None:
            self._lock.close()


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_pieces(tasks: Iterable[Task], workspace: Workspace, workers: int) -> Iterator[Path]:
    """Read every piece that isn't there yet, and give their files in order.

    Raises:
        DataError: the input can't be read, or a process died.
    """
    paths = ((task, workspace.piece(number)) for number, task in enumerate(tasks))
    return run_in_order(((partial(_piece, task, path), path.exists()) for task, path in paths), workers)


def run_in_order(calls: Iterator[tuple[Callable[[], T], bool]], workers: int) -> Iterator[T]:
    """Run calls and give their results in order: here, and in processes once the calls turn out to take long.

    Processes start after two seconds of work, where the calls take more time than whoever uses the results.

    Args:
        calls: what to run, and whether it takes no time, so that it is run here in any case.
        workers: processes; 1 runs everything here.

    Raises:
        DataError: a process died; and what the calls raise.
    """
    begun, busy = time.monotonic(), 0.0
    for call, _ in calls:
        start = time.monotonic()
        result = call()
        busy += time.monotonic() - start
        yield result
        if workers > 1 and busy > PATIENCE and 2 * busy > time.monotonic() - begun:
            yield from _run_in_processes(calls, workers)
            return


def _run_in_processes(calls: Iterator[tuple[Callable[[], T], bool]], workers: int) -> Iterator[T]:
    pending: deque[Callable[[], T]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        for call, here in calls:
            pending.append(call if here else pool.submit(call).result)
            while len(pending) > 2 * workers + 2:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that reads structures died: it ran out of memory, or the script that called lacks "
            'if __name__ == "__main__"; with workers=1 everything runs in one process'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _piece(task: Task, path: Path) -> Path:
    if not path.exists():
        _read_piece(task, path)
    return path


def _read_piece(task: Task, path: Path) -> None:
    table = task()
    partial = path.with_suffix(".arrow-partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(partial, path)


def open_piece(path: Path) -> pa.Table:
    """Map a piece into memory."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def schema_of(path: Path) -> pa.Schema:
    """Return the schema of a piece, which has its account."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).schema


def ids_of(path: Path) -> list[str]:
    """Return the ids of a piece's crystals."""
    return open_piece(path)["material_id"].to_pylist()


def _end_with_parent() -> None:
    """Let a process end when the one that started it is killed; it would wait for work forever."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
