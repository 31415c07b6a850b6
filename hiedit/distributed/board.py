"""Progress of something in an actor, for whoever shows it. Imports nothing: its process is a
small one."""

from __future__ import annotations


class Board:
    """The last (done, total) that was put up."""

    def __init__(self):
        self.last = (0, 0)

    def put(self, done: int, total: int) -> None:
        self.last = done, total

    def read(self) -> tuple[int, int]:
        return self.last
