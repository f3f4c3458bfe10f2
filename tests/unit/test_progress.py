from __future__ import annotations

import pytest

from selective_dpo.distributed import progress
from selective_dpo.distributed.progress import SECONDS_BETWEEN_LINES, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_elsewhere_than_in_a_terminal_a_line_now_and_then(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(400, "seed41-fold0 held-out") as shown:
        shown.advance(10)
        assert capsys.readouterr().err == ""
        clock.now += SECONDS_BETWEEN_LINES + 10
        shown.advance(90)
        # 100 pairs in 40 s: 2.5 a second, and 300 more take 120 s.
        line = "seed41-fold0 held-out: 100 pairs, 2.5 pairs/s, 25%, 120 s left\n"
        assert capsys.readouterr().err == line
        clock.now += SECONDS_BETWEEN_LINES - 1
        shown.advance(100)
        assert capsys.readouterr().err == ""


def test_without_a_total_there_is_no_share_and_no_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(0, "pairs", unit="rows") as shown:
        clock.now += 100.0
        shown.advance(5000)
    assert capsys.readouterr().err == "pairs: 5,000 rows, 50.0 rows/s\n"


def test_slow_steps_are_seconds_a_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "policy", unit="updates") as shown:
        clock.now += 50.0
        shown.advance(4)
    # 4 in 50 s: 12.5 s each, and 6 more take 75 s.
    assert capsys.readouterr().err == "policy: 4 updates, 12.5 s/update, 40%, 75 s left\n"


def test_only_the_main_process_shows_anything(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second:
        is_main_process = False

    monkeypatch.setattr(progress, "this_process", Second)
    with Progress(10, "pairs") as shown:
        clock.now += 100.0
        shown.advance(5)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress(10, "reference") as shown:
        shown.advance(10)
    assert "reference" in capsys.readouterr().err
