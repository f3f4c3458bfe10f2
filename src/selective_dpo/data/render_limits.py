"""What rendering may take: a chat template is a program of somebody else's, which may never end.

Python's loops are interrupted by a timer; memory is limited by the system; what a template wrote is measured.
The timer counts processor time, so a busy or sleeping machine is no fault of the template's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from selective_dpo.errors import RunawayTemplateError

Rendered = TypeVar("Rendered")

MOST_SECONDS = 10.0
"""Processor seconds for the conversations of one pair; templates in use need some 0.0001."""
MOST_MEMORY = 2 << 30
"""Bytes that rendering may add to the process's memory."""
MOST_CHARACTERS = 1_000_000
"""That a template may write of its own, besides `MOST_TIMES` as many as the conversation has."""
MOST_TIMES = 16
"""Escaping makes up to six characters of one."""
MOST_TEMPLATE = 1_000_000
"""Characters of a template itself; those in use have fewer than 30,000."""

_HARD = 3
"""Times `MOST_SECONDS`, counted over all threads, after which a process ends that cannot be interrupted."""


def within_limits(work: Callable[[], Rendered]) -> Rendered:
    """What `work` returns. It renders conversations, and does nothing that may not be given up with them.

    Time is limited in a POSIX system's main thread, where signals arrive, and memory on Linux. A single
    operation of Python's that cannot be interrupted (it compares nested lists, say) ends the process by
    SIGPROF, after `_HARD` times `MOST_SECONDS`. Timers, handlers and limits of others are put back.

    Raises:
        RunawayTemplateError: the time or the memory is used up. The message says no more than that.
    """
    try:
        with _limited_time(), _limited_memory():
            return _under_the_timer(work)
    except _TimeIsUp:
        raise RunawayTemplateError(f"takes more than {MOST_SECONDS:g} s") from None
    except MemoryError:
        raise RunawayTemplateError(f"needs more than {MOST_MEMORY / (1 << 30):g} GiB of memory") from None


def _under_the_timer(work: Callable[[], Rendered]) -> Rendered:
    """Only what is called from here is interrupted: see `_is_rendering`."""
    return work()


def check_template_size(template: object) -> None:
    """Raise `RunawayTemplateError` where a template's own text is longer than any that is used."""
    if isinstance(template, str) and len(template) > MOST_TEMPLATE:
        raise RunawayTemplateError(f"has more than {MOST_TEMPLATE:,} characters")


def check_written(characters: int, messages: list[dict[str, Any]]) -> None:
    """Raise `RunawayTemplateError` where a template made too many characters of a conversation."""
    if characters <= MOST_CHARACTERS:
        return
    given = sum(len(content) for message in messages if isinstance(content := message.get("content"), str))
    if characters > MOST_CHARACTERS + MOST_TIMES * given:
        raise RunawayTemplateError(f"writes {characters:,} characters for {given:,}")


class _TimeIsUp(BaseException):
    """Not an `Exception`: what is rendered must not catch it."""


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    begun = time.thread_time()

    def tick(number: int, frame: FrameType | None) -> None:
        if time.thread_time() - begun < MOST_SECONDS:
            _arm_last_resort()
        elif _is_rendering(frame):
            sys.unraisablehook = lost
            raise _TimeIsUp

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not _TimeIsUp:
            hook(unraisable)

    hook = sys.unraisablehook
    handler = signal.signal(signal.SIGVTALRM, tick)
    try:
        # It ticks on: what is raised at one tick is lost in a destructor, or swallowed by Jinja.
        timer = signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS / 10, MOST_SECONDS / 10)
        is_armed = _arm_last_resort()
        try:
            yield
        finally:
            sys.unraisablehook = hook
            signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
            if is_armed:
                signal.setitimer(signal.ITIMER_PROF, 0.0)
    finally:
        # None: it was set outside of Python, and cannot be put back.
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)


def _is_rendering(frame: FrameType | None) -> bool:
    """Whether what a signal has interrupted is the work, and not what comes after it.

    The first tick often comes late, when a gigabyte has been copied or freed: in the midst of handling the
    error, or of putting back timers and limits, which must not be interrupted itself.
    """
    while frame is not None:
        if frame.f_code is _under_the_timer.__code__:
            return True
        frame = frame.f_back
    return False


def _arm_last_resort() -> bool:
    """Have the system end this process unless the timer is set again; not where a profiler uses it."""
    if signal.getsignal(signal.SIGPROF) is not signal.SIG_DFL:
        return False
    signal.setitimer(signal.ITIMER_PROF, _HARD * MOST_SECONDS)
    return True


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    used = _address_space()
    if used is None:
        yield
        return
    import resource  # POSIX only

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + MOST_MEMORY
    if any(limit != resource.RLIM_INFINITY and limit <= most for limit in (soft, hard)):
        yield  # it is limited already
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes of this process's address space; None where Linux does not tell."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(descriptor, 64).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(descriptor)
