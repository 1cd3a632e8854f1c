"""What a notebook concludes: sentences with their numbers and a verdict, kept beside the figures."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vaenb.runs import ROOT, write_atomically


@dataclass(frozen=True)
class Claim:
    """A prediction and what became of it.

    Attributes:
        id: experiment and number, such as ``E1.2``.
        claim: the sentence. One that was restated after a measurement was seen is named as such in the notebook.
        measured: the numbers that decide, with their uncertainty; JSON-able.
        holds: whether they bear the sentence out. A prediction that failed stays, with False.
    """

    id: str
    claim: str
    measured: dict[str, Any]
    holds: bool


class ClaimsError(ValueError):
    """A file of claims is damaged; the message names it and says what to do."""


def figures_folder(dataset: str) -> Path:
    """Where a notebook's figures and claims go: ``figures/<dataset>``, or ``$VAENB_FIGURES`` while make stages them."""
    return Path(os.environ.get("VAENB_FIGURES") or ROOT / "figures" / dataset)


def conclude(name: str, dataset: str, claims: list[Claim]) -> None:
    """Print one verdict per line and write ``<name>.claims.json``.

    The printed lines hold no measured digits: they are what must come out the same on another machine.
    """
    content = [{**asdict(claim), "holds": bool(claim.holds)} for claim in claims]
    write_atomically(
        figures_folder(dataset) / f"{name}.claims.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    )
    for claim in claims:
        print(f"{claim.id}  {'holds' if claim.holds else 'DOES NOT HOLD'}  {claim.claim}")


def read(path: Path) -> list[dict[str, Any]]:
    """The claims of a file, each with what ``Claim`` has.

    Raises:
        ClaimsError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [{name: claim[name] for name in ("id", "claim", "measured", "holds")} for claim in content]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ClaimsError(f"{path} holds no claims ({reason}): restore it, or delete it and make it anew") from None


def lost(before: Path, now: Path) -> list[str]:
    """Claims that held in one claims file and do not, or are missing, in another; as 'id sentence'.

    Raises:
        ClaimsError: one of them is damaged.
    """
    if not before.exists():
        return []
    holds = {str(claim["id"]) for claim in read(now) if claim["holds"]} if now.exists() else set()
    return [f"{claim['id']} {claim['claim']}" for claim in read(before) if claim["holds"] and str(claim["id"]) not in holds]
