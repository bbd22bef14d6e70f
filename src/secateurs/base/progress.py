"""How long runs report their progress: a callback."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what is being done, how many steps are done, of how many)."""


def silent(label: str, done: int, total: int) -> None:
    pass


def ticker(progress: Progress, label: str, total: int, done: int = 0) -> Callable[[], None]:
    """A function that counts its calls and reports each of them to `progress`."""

    def tick() -> None:
        nonlocal done
        done += 1
        progress(label, done, total)

    return tick
