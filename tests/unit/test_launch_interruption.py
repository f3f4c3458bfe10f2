"""SIGTERM raises at once, is only noted, or is passed on; the handler that was there is put back."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selective_dpo.distributed import signals
from selective_dpo.distributed.signals import (
    AGAIN,
    ask_to_be_repeated,
    passing_on,
    stopping_at_once,
    stopping_when_asked,
)
from selective_dpo.errors import Interrupted


def strike() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handler_is_put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before
    signals._NOTED.received = False


def test_at_once() -> None:
    with (
        pytest.raises(Interrupted, match="interrupted by SIGTERM: run the same command to go on"),
        stopping_at_once(),
    ):
        strike()
        pytest.fail("it was not raised")


def test_when_asked() -> None:
    with pytest.raises(Interrupted), stopping_when_asked() as is_asked:
        assert not is_asked()
        strike()
        assert is_asked()


def test_when_asked_and_acted_upon_by_another_error() -> None:
    with pytest.raises(ZeroDivisionError), stopping_when_asked():
        strike()
        raise ZeroDivisionError


def test_without_a_signal_nothing_is_raised() -> None:
    with stopping_at_once(), stopping_when_asked() as is_asked:
        assert not is_asked()


def test_asked_inside_at_once_is_only_noted() -> None:
    steps = 0
    with pytest.raises(Interrupted), stopping_at_once(), stopping_when_asked() as is_asked:
        strike()
        while not is_asked():
            pytest.fail("it was not noted")
        steps += 1
    assert steps == 1


def test_what_a_library_swallows_is_not_forgotten() -> None:
    with stopping_at_once():
        with contextlib.suppress(Exception):
            strike()
        with pytest.raises(Interrupted), stopping_when_asked() as is_asked:
            assert is_asked()
    with pytest.raises(Interrupted), stopping_at_once():
        pytest.fail("the next job was begun")
    with stopping_at_once(forgetting=True):
        pass


def test_a_signal_is_passed_on() -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pause()
    with passing_on(lambda: [child]) as came:
        assert not came()
        strike()
        assert came()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_process_that_is_gone_is_no_error() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with passing_on(lambda: [child]) as came:
        strike()
        assert came()


def test_in_another_thread_it_has_no_effect_and_does_no_harm() -> None:
    found: list[bool] = []

    def work() -> None:
        with stopping_at_once(), stopping_when_asked() as is_asked:
            found.append(is_asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_sigusr2_means_what_sigterm_means_and_asks_to_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "checkpoints" / "again-5"
    monkeypatch.setenv(AGAIN, str(asked))
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"), stopping_at_once(forgetting=True):
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(5)
    assert signal.getsignal(signal.SIGUSR2) is before
    assert not asked.exists()
    ask_to_be_repeated()
    assert asked.is_file()
