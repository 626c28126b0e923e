"""What goes wrong during a run without being a mistake of the program."""

import re
import signal
import threading
import time
import traceback

_DEAD_WORKER = re.compile(r"DataLoader worker \(pid")


class TrainingWarning(UserWarning):
    """The run goes on, but something was lost or left out."""


class CheckpointWarning(TrainingWarning):
    """A checkpoint could not be written, or could not be used and an older one was."""


def death_of_worker(error: Exception) -> str | None:
    """What torch says about a worker process of a DataLoader that died; None if none did.

    The loader's iterator, which the error's frames hold, is gone afterwards.
    """
    said = _said(error)
    if said is None and isinstance(error, OSError | EOFError):
        # The connection to a worker broke; that the worker has died is heard a little later.
        try:
            time.sleep(1.0)
        except RuntimeError as later:
            said = _said(later)
    if said is not None:
        _let_go(error)
    return said


def _said(error: Exception) -> str | None:
    text = str(error)
    found = isinstance(error, RuntimeError) and _DEAD_WORKER.search(text) is not None
    return text.strip() if found else None


def _let_go(error: Exception) -> None:
    """Drop what the frames hold.

    As long as the iterator lives, torch raises the error again whenever any process ends: also
    when the other workers do.
    """
    heard = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if heard else None
    try:
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__context__
    finally:
        if heard:
            signal.signal(signal.SIGCHLD, before)
