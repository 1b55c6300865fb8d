"""A function over many items on several processes: in order, a few at a time, and with an end to everything."""

import os
import time

import pytest

from corpus.parallel import AHEAD, map_ordered
from utils import InputError, RunError


def double(i: int) -> int:
    time.sleep(0.02 if i == 0 else 0)
    if i == 13:
        raise InputError("13 is wrong.")
    if i == 17:
        os._exit(9)
    return 2 * i


@pytest.mark.parametrize("n_processes", [0, 1, 2])
def test_results_come_in_order_and_items_are_drawn_as_needed(n_processes):
    drawn = []

    def items():
        for i in range(10):
            drawn.append(i)
            yield i

    with map_ordered(n_processes) as map_tasks:
        results = map_tasks(double, items())
        assert next(results) == 0
        assert len(drawn) <= AHEAD * n_processes + 1
        assert list(results) == list(range(2, 20, 2))


def test_a_single_item_is_done_here():
    with map_ordered(2) as map_tasks:
        assert list(map_tasks(process_of, [1])) == [os.getpid()]
        assert os.getpid() not in map_tasks(process_of, [1, 2])


def process_of(_) -> int:
    return os.getpid()


def test_an_error_comes_where_its_item_has_its_turn():
    with map_ordered(2) as map_tasks:
        results = map_tasks(double, range(10, 20))
        assert [next(results) for _ in range(3)] == [20, 22, 24]
        with pytest.raises(InputError, match="13 is wrong"):
            next(results)


def test_a_helper_that_is_killed_is_told():
    with map_ordered(1) as map_tasks, pytest.raises(RunError, match="ended without a message"):
        list(map_tasks(double, range(16, 20)))
