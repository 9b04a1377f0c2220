"""Starting many tasks that each send a request."""

import asyncio
from collections.abc import Callable, Coroutine

# Building a request takes a few hundred microseconds.
_TASKS_PER_TURN = 8


async def start_tasks(
    group: asyncio.TaskGroup, count: int, work: Callable[[], Coroutine[None, None, None]]
) -> None:
    """Starts `count` tasks, a few in each turn of the event loop.

    All at once they would build all their requests before the first one left this process.
    """
    for number in range(count):
        if number and number % _TASKS_PER_TURN == 0:
            await asyncio.sleep(0)
        group.create_task(work())
