"""Numbers for the page, each marked up with the JSON file and key that it comes from."""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True)
class Cited:
    """A JSON file: its name and its contents."""

    file: str
    data: Any

    def at(self, path: str) -> Any:
        """The value under a path of keys and list positions, 'rows/0/seconds_ratio/value'. Raises KeyError or IndexError."""
        found = self.data
        for key in path.split("/"):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found

    def show(self, path: str, form: str = "{:.4g}") -> Markup:
        """The value as HTML, formatted by `form`, with file, key and form in data-from, data-key and data-form."""
        value = self.at(path)
        form = form if isinstance(value, (int, float)) else "{}"
        return Markup('<span data-from="{}" data-key="{}" data-form="{}">{}</span>').format(
            self.file, path, form, form.format(value)
        )

    def interval(self, path: str, form: str = "{:.4g}") -> Markup:
        """'[low, high]' of the estimate under a path."""
        return Markup('<span class="interval">[{}, {}]</span>').format(
            self.show(f"{path}/low", form), self.show(f"{path}/high", form)
        )

    def estimate(self, path: str, form: str = "{:.4g}") -> Markup:
        """Value and interval of the estimate under a path."""
        return Markup("{} {}").format(self.show(f"{path}/value", form), self.interval(path, form))
