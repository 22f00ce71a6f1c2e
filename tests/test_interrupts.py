"""An interrupt is never lost and never comes at a bad moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from workers.interrupts import Interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test does, the handlers are as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _interrupt(number: signal.Signals = signal.SIGINT) -> None:
    signal.raise_signal(number)


def test_an_interrupt_waits_for_the_safe_point() -> None:
    with Interrupts() as interrupts:
        interrupts.raise_noted()
        _interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_noted()
        interrupts.raise_noted()


def test_an_interrupt_inside_a_finaliser_is_not_lost() -> None:
    class Interrupted:
        def __del__(self) -> None:
            _interrupt()

    with Interrupts() as interrupts:
        thing = Interrupted()
        del thing
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_noted()


def test_an_interrupt_that_nobody_looked_for_is_raised_on_the_way_out() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        _interrupt()


def test_a_failure_goes_before_an_interrupt() -> None:
    def fail() -> None:
        with Interrupts():
            _interrupt()
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        fail()


def test_the_second_interrupt_is_raised_at_once() -> None:
    with Interrupts():
        _interrupt()
        with pytest.raises(KeyboardInterrupt):
            _interrupt()


def test_handlers_are_restored_and_what_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        _interrupt(signal.SIGTERM)
        interrupts.raise_noted()
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def body() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(10)
    assert seen == [before]
