import functools

import pytest

from vaenb import runs, shared


def job(log, name, busy_times, wait):
    log.append((name, wait))
    if log.count((name, False)) <= busy_times and not wait:
        raise runs.Busy(name)
    return name.upper()


def jobs(log, **busy_times):
    return [functools.partial(job, log, name, times) for name, times in busy_times.items()]


def test_results_come_in_the_order_of_the_jobs():
    assert shared.each(jobs([], a=0, b=0, c=0), "jobs") == ["A", "B", "C"]


def test_what_others_are_busy_with_comes_last():
    log = []
    assert shared.each(jobs(log, a=1, b=0, c=0), "jobs") == ["A", "B", "C"]
    assert log == [("a", False), ("b", False), ("c", False), ("a", False)]


def test_it_waits_only_when_others_are_busy_with_all_that_is_left():
    log = []
    assert shared.each(jobs(log, a=9, b=0, c=9), "jobs") == ["A", "B", "C"]
    assert [name for name, wait in log if wait] == ["a", "c"] or [name for name, wait in log if wait] == ["c", "a"]
    first = log.index(next(call for call in log if call[1]))
    assert {call for call in log[first - 2 : first]} == {("a", False), ("c", False)}


def test_where_waiting_is_refused_it_ends():
    def busy(wait):
        raise runs.Busy("for a helper, even when it is told to wait")

    with pytest.raises(runs.Busy):
        shared.each([busy], "jobs")


def test_other_errors_are_not_swallowed():
    def fails(wait):
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        shared.each([fails], "jobs")
