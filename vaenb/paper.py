"""What the write-up is made of: numbers and figures that the other notebooks left in ``figures/``, quoted with their source.

Nothing in the write-up is typed: every number is read from the JSON file of a figure or of claims, and says which one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from IPython.display import Markdown, display

from vaenb import claims
from vaenb.figures.style import spread
from vaenb.quality import interval
from vaenb.runs import ROOT


class ResultError(LookupError):
    """A figure, a claim or a number that is not there; the message says where it was looked for."""


@dataclass(frozen=True)
class Quoted:
    """A number of a results file, or one for each training seed.

    Format specifications are those of floats and mean the average over seeds; with ``±`` at the end the standard
    deviation follows, with ``…`` the 95 % interval of the mean instead of it (Student's t, see ``quality.interval``).

    Attributes:
        values: one for each seed.
        source: file and path within it.
    """

    values: tuple[float, ...]
    source: str

    def __float__(self) -> float:
        return float(mean(self.values))

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    def least(self) -> "Quoted":
        """That of the seed that has the smallest."""
        return Quoted((min(self.values),), f"least of {self.source}")

    def __truediv__(self, other: "Quoted") -> "Quoted":
        """Ratio of the means."""
        return Quoted((float(self) / float(other),), f"{self.source} ÷ {other.source}")

    def __sub__(self, other: "Quoted") -> "Quoted":
        """Difference of the means."""
        return Quoted((float(self) - float(other),), f"{self.source} − {other.source}")

    def __neg__(self) -> "Quoted":
        return Quoted(tuple(-value for value in self.values), f"−({self.source})")

    def __format__(self, spec: str) -> str:
        kind, spec = spec[-1:], spec.rstrip("±…")
        if kind in ("±", "…") and len(self.values) < 2:
            raise ResultError(f"{self.source} is of one seed: it has no spread")
        if kind == "…":
            low, high = interval(list(self.values))
            text = f"{low:{spec}} to {high:{spec}}"
        else:
            text = f"{float(self):{spec}}" + (f" ± {spread(self.values, f'{{:{spec}}}')}" if kind == "±" else "")
        text = text.replace("%", " %").replace("-", "−")
        return f'<data value="{float(self):.6g}" title="{escape(self.source)}">{text}</data>'


@dataclass(frozen=True)
class Results:
    """What the notebooks left for one data set: ``results("symptom_bounds", "bounds", "FC-VAE, 20", "rate")``."""

    dataset: str

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return ROOT / "figures" / self.dataset

    def __call__(self, figure: str, *path: str | int) -> Quoted:
        """A number that a figure shows, or those of all seeds.

        Args:
            figure: name without suffix.
            path: keys and indices that lead to it among the numbers of its JSON file.

        Raises:
            ResultError: there is no such file or number.
        """
        return self._quoted(f"{figure}.json", self._read(figure)["numbers"], path)

    def claim(self, name: str, *path: str | int) -> Quoted:
        """A number that decided a claim, such as ``results.claim("E5.1", "ratio", "per_seed")``.

        Raises:
            ResultError: no notebook made this claim, or it has no such number.
        """
        file, claim = self._claim(name)
        return self._quoted(f"{file}: {name}", claim["measured"], path)

    def verdict(self, name: str) -> str:
        """``holds`` or ``does not hold``, with the claim as its source."""
        file, claim = self._claim(name)
        text, source = (
            "holds" if claim["holds"] else "does not hold",
            escape(f"{file}: {name}. " + claim["claim"]),
        )
        return f'<span class="verdict" title="{source}">{text}</span>'

    def claims(self) -> list[dict[str, Any]]:
        """All claims of all notebooks, each with the name of its ``file``."""
        try:
            files = sorted(self.folder.glob("*.claims.json"))
            return [{"file": path.name, **claim} for path in files for claim in claims.read(path)]
        except claims.ClaimsError as error:
            raise ResultError(str(error)) from None

    def figure(self, name: str, caption: str) -> None:
        """Show a figure under a caption that states what it finds; the data and sample sizes stand in the figure itself.

        Raises:
            ResultError: no such figure.
        """
        content = self._read(name)
        path = f"../figures/{self.dataset}/{name}.png"  # as seen from notebooks/
        display(Markdown(f'![{escape(content["alt"])}]({path} "{name}")\n\n*{caption}*'))

    def _claim(self, name: str) -> tuple[str, dict[str, Any]]:
        for claim in self.claims():
            if claim["id"] == name:
                return claim["file"], claim
        raise ResultError(f"no notebook claims {name!r} in {self.folder}")

    def _read(self, figure: str) -> dict[str, Any]:
        path = self.folder / f"{figure}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {"alt": str(content["alt"]), "numbers": content["numbers"]}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ResultError(f"cannot read {path} ({reason}): make figures DATASET={self.dataset} makes it") from None

    def _quoted(self, file: str, content: Any, path: Sequence[str | int]) -> Quoted:
        source = f"{file}: {' / '.join(map(str, path))}"
        try:
            for key in path:
                content = content[key]
            values = tuple(float(value) for value in (content if isinstance(content, list) else [content]))
            float(mean(values))  # of at least one
        except (KeyError, IndexError, TypeError, ValueError):
            raise ResultError(f"{self.folder}: there is no number at {source}") from None
        return Quoted(values, source)


def say(text: str) -> None:
    """Show a piece of the write-up, Markdown."""
    display(Markdown(text.strip()))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], form: Callable[[Any], str] = str) -> None:
    """Show a table: a row's first entry names it.

    Args:
        columns: their titles, the first above the names.
        rows: entries, formatted by ``form``.
        form: of an entry.
    """
    lines = [columns, ["---"] * len(columns), *([form(entry) for entry in row] for row in rows)]
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))
