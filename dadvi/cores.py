"""Work of this process on all its cores, with the same bits however many there are."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_all_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the function's result for each item, computed as many at a time as there are cores."""
    return list(_threads().map(function, items))


@cache
def _threads() -> ThreadPoolExecutor:
    """Return threads, each with one torch thread: the bits must not depend on cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cores, "cores", initializer=torch.set_num_threads, initargs=(1,))
