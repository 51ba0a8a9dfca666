"""Threads that meet as the processes of a run do: for what must hold on several, without the time these take."""

import json
import threading
from collections.abc import Callable
from typing import Any

from train.processes import Processes


def together(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` returns in each of `count` threads, by rank. As under a launcher, one that ends with an error ends
    the others when they next wait for it; the first error is raised again here."""
    barrier = threading.Barrier(count)
    said: list[Any] = [None] * count
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    class Thread(Processes):
        def gather(self, value: Any) -> list[Any]:
            said[self.rank] = json.dumps(value)
            barrier.wait(30)
            everything = [json.loads(text) for text in said]
            barrier.wait(30)
            return everything

        def any(self, flag: bool) -> bool:
            return any(self.gather(flag))

    def run(rank: int) -> None:
        try:
            results[rank] = work(Thread(rank, count))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
