"""A race: calls that are timed in turn, so that what slows the machine slows them all."""

import time

import numpy as np


def race(calls, rounds: int) -> np.ndarray:
    """Seconds (calls, rounds) of functions without arguments.

    The order turns round each time, so that none always follows the same one.
    """
    seconds = np.zeros((len(calls), rounds))
    order = list(range(len(calls)))
    for turn in range(rounds):
        for i in order:
            start = time.perf_counter()
            calls[i]()
            seconds[i, turn] = time.perf_counter() - start
        order.reverse()
    return seconds
