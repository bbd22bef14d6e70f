"""How long runs report their progress: a callback."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""(what is being done, how many steps are done, of how many)."""


def silent(label: str, done: int, total: int) -> None:
    pass


@contextmanager
def no_bars() -> Iterator[None]:
    """A context in which transformers and the hub show no bars of their own; after it they do as before."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    shown, hidden = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        (disable_progress_bars if hidden else enable_progress_bars)()


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers say nothing but errors."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def ticker(progress: Progress, label: str, total: int, done: int = 0) -> Callable[[], None]:
    """A function that counts its calls and reports each of them to `progress`."""

    def tick() -> None:
        nonlocal done
        done += 1
        progress(label, done, total)

    return tick


class Clock:
    """Seconds of a run by stage. seconds: those of an earlier part of the run, which are added to."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds
        self._since = time.perf_counter()

    def spend(self, stage: str) -> None:
        """Count the time since the last call, or since the clock was made, for a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
