"""How a long run tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what is being done, how much is done, of how much)."""


def silent(label: str, done: int, total: int) -> None:
    pass


def ticker(progress: Progress, label: str, total: int, done: int = 0) -> Callable[[], None]:
    """A function that counts its calls and shows them."""

    def tick() -> None:
        nonlocal done
        done += 1
        progress(label, done, total)

    return tick
