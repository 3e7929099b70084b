"""Signals that stop a command so that it can be resumed.

By default they raise :class:`Stopped` immediately, and the command exits as unfinished. Training, and processes that
wait for child processes, only record them and check between steps.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import Popen, TimeoutExpired
from types import FrameType

from crysldnet.errors import UNFINISHED, Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals sent by schedulers, if supported by the system."""
DEBOUNCE_S = 10.0
"""No exception is raised within this time after a signal: process groups get it repeatedly, and exiting takes time."""

STUCK_S = 5.0
"""How long a signal may wait for Python to handle it; in a blocked collective it never does."""
ORPHAN_S = 20.0
"""How long a process outlives its parent, to determine and report its fate."""
RUN_NAME = "CRYSLDNET_RUN_NAME"
"""Passes the first process's id and the run name to child processes, as ID:NAME."""

PARENT_HOLDS_STDIN = "CRYSLDNET_PARENT_HOLDS_STDIN"
"""Set if standard input is a pipe that closes with the parent process."""

children: list[Popen] = []
"""Ranks started by this process, which are stopped with it."""
_last = -DEBOUNCE_S
_installed = False
_raised = threading.Event()


class Stopped(BaseException):
    """A signal asked the command to stop. Libraries don't catch this exception."""


def install_handlers() -> None:
    """Raise :class:`Stopped` on signals from now on."""
    global _installed
    if not _installed:
        arrived, noticed = socket.socketpair()
        noticed.setblocking(False)
        signal.set_wakeup_fd(noticed.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_end_where_stuck, args=(arrived, noticed), daemon=True, name="stopping").start()
    _installed = True
    for number in SIGNALS:
        signal.signal(number, _raise)


def reinstall_handlers() -> None:
    """Reinstall our signal handlers if a library has replaced them."""
    if _installed and threading.current_thread() is threading.main_thread():
        install_handlers()


def _raise(number: int, _: FrameType | None) -> None:
    _raised.set()
    if not recently_signalled():
        mark_signal()
        raise Stopped(_message(number))


def _end_where_stuck(arrived: socket.socket, _: socket.socket) -> None:
    """End the process if the main thread is blocked outside Python and can't handle a signal."""
    while number := arrived.recv(1)[0]:
        if number not in SIGNALS or signal.getsignal(number) is not _raise:
            continue
        if not _raised.wait(STUCK_S) and signal.getsignal(number) is _raise:
            if not started_by_the_first():
                sys.stderr.write(f"unfinished: {_message(number)}\n")
                sys.stderr.flush()
            end_children()
            os._exit(0 if started_by_the_first() else UNFINISHED)


def started_by_the_first() -> bool:
    """Return whether Lightning started this process from the first one, which reports the exit status of all."""
    return os.environ.get(RUN_NAME, "").partition(":")[0] == str(os.getppid())


def end_with_the_first() -> None:
    """Exit when the launcher exits; otherwise this rank would wait forever in a collective.

    Lightning numbers the processes that it starts; other processes may continue.
    """
    if started_by_the_first() and os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_end_soon_after, args=(os.getppid(),), daemon=True, name="orphan").start()


def _end_soon_after(first: int) -> None:
    while os.getppid() == first:
        time.sleep(1.0)
    time.sleep(ORPHAN_S)
    sys.stderr.write(f"process {first}, which started this one, is gone; this one ends\n")
    sys.stderr.flush()
    os._exit(1)


def end_with_the_parent() -> None:
    """Treat the exit of the parent as SIGTERM, if the parent requested this.

    When the parent exits in any way, the system closes its end of the pipe on standard input, which is otherwise
    unused.
    """
    if os.environ.pop(PARENT_HOLDS_STDIN, None) is not None:
        pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        threading.Thread(target=_stop_at_the_end_of, args=(pipe,), daemon=True, name="parent").start()


def _stop_at_the_end_of(pipe: int) -> None:
    os.read(pipe, 1)
    sys.stderr.write("the process that started this one is gone\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)


def end_children() -> None:
    """Stop the ranks started by this process, which would otherwise wait for it."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(STUCK_S)
        except TimeoutExpired:
            child.kill()


def mark_signal() -> None:
    """Treat signals in the next seconds as repeats of the one being handled."""
    global _last
    _last = time.monotonic()


def recently_signalled() -> bool:
    """Return whether a signal arrived so recently that the command is still exiting."""
    return time.monotonic() - _last < DEBOUNCE_S


def ignore() -> None:
    """Keep signals from changing the exit status during process exit."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _message(number: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name}; continue with resume=last, or start again if there was no run folder yet"


def leave_to_parent(_: int = 0) -> None:
    """Let this process survive a signal to the whole group, because the parent needs it until its step is done.

    The parent can still stop it with SIGTERM. Called with the index of a DataLoader worker at its start.
    """
    for number in (*SIGNALS, signal.SIGINT):
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # only Linux reports the sender of a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True, name="stopping").start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def noted() -> Iterator[Callable[[], None]]:
    """Yield a function that raises ``Interrupted`` if a signal arrived meanwhile; it is also called at the end.

    Raising when the signal arrives could lose a newly started process. Outside the main thread, signal handling is
    unchanged.
    """
    numbers: list[int] = []

    def stop_if_signalled() -> None:
        if numbers:
            mark_signal()
            raise Interrupted(_message(numbers[0]))

    if threading.current_thread() is not threading.main_thread():
        yield stop_if_signalled
        return
    before = {n: signal.signal(n, lambda number, _: numbers.append(number)) for n in SIGNALS}
    try:
        yield stop_if_signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stop_if_signalled()
