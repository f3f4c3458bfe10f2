"""Chat templates: which one a tokenizer uses, and what it can do."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jinja2

from selective_dpo.config import NAMED_TEMPLATES
from selective_dpo.data.adapters import Messages
from selective_dpo.errors import ConfigError, RunawayTemplateError, SelectiveDPOError, TemplateError
from selective_dpo.storage.digests import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = "system-text-marker"

_USER: dict[str, Any] = {"role": "user", "content": "text"}

_NAME = "selective_dpo_template"
"""An attribute of tokenizers that `apply_template` has changed: the template's name."""


class Conversation(NamedTuple):
    """What a template makes a text of."""

    messages: Messages
    add_generation_prompt: bool = False
    """Whether the beginning of an answer is written after the messages."""


def load_template(name: str) -> str:
    """The text of a named template, or of the Jinja file at the path `name`.

    Raises:
        ConfigError: neither a known name nor a file.
    """
    if name in NAMED_TEMPLATES:
        return (resources.files(__package__) / "templates" / f"{name}.jinja").read_text("utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"chat_template {name!r} is none of {', '.join(NAMED_TEMPLATES)} nor the path of a file"
        )
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(MOST_TEMPLATE + 1)  # `render` refuses what is longer
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"chat_template {name} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def apply_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make `tokenizer` use the template `name` (see `load_template`); empty: it keeps its own.

    Raises:
        ConfigError: no such template.
        TemplateError: it is not valid Jinja, or does not end on a word.
    """
    if not name:
        return
    tokenizer.chat_template = load_template(name)
    setattr(tokenizer, _NAME, name)
    try:
        _render_each(tokenizer, [Conversation([_USER])])
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat_template {name}, line {error.lineno}: {error.message}") from error
    except (SyntaxError, RecursionError) as error:
        # Jinja turns a template into Python code, which has limits of its own.
        raise TemplateError(f"chat_template {name} is too deep for Jinja: {error}; simplify it") from error
    except SelectiveDPOError:
        raise
    except Exception:
        pass  # It may refuse this conversation; whether it suits the data shows on the data.


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the template that `tokenizer` uses; of nothing, if it has none."""
    return digest(tokenizer.chat_template)


def mentions_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template was made for system messages, so that an empty one can be put before a prompt.

    Its own text must mention them, or be ChatML: the rule of the alignment handbook, with which the original
    ran. A template that writes whatever role it is given, as Llama-3's do, mentions none, and its model has
    seen none. What it renders must hold the message as well: some name the role only to refuse it.
    """
    try:
        (rendered,) = render(tokenizer, [Conversation([{"role": "system", "content": _MARKER}, _USER])])
    except jinja2.TemplateError:
        return False
    text = tokenizer.get_chat_template()
    return _MARKER in rendered and ("system" in text or "<|im_start|>" in text)


def require_template(tokenizer: PreTrainedTokenizerBase, *, empty_system_message: bool) -> None:
    """Check that conversations can be rendered as the recipe asks.

    Raises:
        TemplateError: the tokenizer has no chat template.
        ConfigError: an empty system message is asked for, and the template takes none.
    """
    if not tokenizer.chat_template:
        raise TemplateError(
            "the data are conversations and the tokenizer has no chat template; set model.chat_template to "
            f"{', '.join(NAMED_TEMPLATES)} or the path of a Jinja file"
        )
    if empty_system_message and not mentions_system(tokenizer):
        raise ConfigError(
            "data.empty_system_message has no effect: the chat template mentions no system message (or takes "
            "none); remove it"
        )


def render(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[str]:
    """The texts that the tokenizer's template makes of conversations, together within `render_limits`.

    Raises:
        jinja2.TemplateError: whatever went wrong in the template, or a text cannot be encoded.
        RunawayTemplateError: it takes too long, needs too much memory or writes too much.
    """
    try:
        texts = _render_each(tokenizer, conversations)
        for text in texts:
            text.encode("utf-8")
    except (jinja2.TemplateError, SelectiveDPOError):
        raise
    except Exception as error:  # a template is a program: it can divide by zero, or add a text to a number
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
    return texts


def _render_each(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[str]:
    """What transformers' sandbox makes of conversations; an error of the template's is raised as it is."""
    texts: list[str] = []
    messages: Messages = []

    def work() -> list[str]:
        nonlocal messages
        for messages, add_generation_prompt in conversations:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            check_written(len(text), messages)
            texts.append(str(text))
        return texts

    try:
        check_template_size(tokenizer.chat_template)
        return within_limits(work)
    except RunawayTemplateError as error:
        raise RunawayTemplateError(
            f"{_name(tokenizer)} {error}{_place(messages)}; use another template"
        ) from None


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    name = getattr(tokenizer, _NAME, "")
    if name:
        return f"chat_template {name}"
    return f"the chat template of {tokenizer.name_or_path or 'the model'}"


def _place(messages: Messages) -> str:
    if not messages:
        return ""
    return f", on the conversation that ends in {str(messages[-1].get('content'))[-40:]!r}"


# ----------------------------------------------------------------------------------------------------
# What rendering may take: a chat template is a program of somebody else's, which may never end.
#
# Python's loops are interrupted by a timer; memory is limited by the system; what a template wrote is
# measured. The timer counts processor time, so a busy or sleeping machine is no fault of the template's.


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
