"""A panel with fitted weights, as the table that shows how it does and the template file that a service reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from client.calibrate.evidence import Evidence, EvidenceError
from client.calibrate.weights import FOLDS, HeldOut, PanelFit, fit_panel

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST: Final = 120
_NAME: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._/-]*)(?:@([1-9][0-9]*))?")
# Weights are written with this many decimals; a question that rounds to 0 is left out.
_DECIMALS: Final = 4


@dataclass(frozen=True, slots=True)
class FittedPanel:
    """Weights for a panel called `name`, of this version; `members` are its templates."""

    name: str
    version: int
    members: tuple[str, ...]
    fit: PanelFit

    @property
    def weights(self) -> dict[str, float]:
        """Of the members that count."""
        rounded = (
            (name, round(weight, _DECIMALS)) for name, weight in zip(self.members, self.fit.weights, strict=True)
        )
        return {name: weight for name, weight in rounded if weight}

    @property
    def ways(self) -> list[tuple[str, HeldOut]]:
        """Each way of asking and how it does on held-out folds."""
        alone = list(zip(self.members, self.fit.alone, strict=True))
        return [*alone, ("equal weights", self.fit.equal), ("fitted weights", self.fit.fitted)]

    @property
    def verdict(self) -> str:
        """How sure it is that the weights are better than the best question alone, and than equal ones."""
        fit, best = self.fit, self.fit.best
        return (
            f"fitted weights against {self.members[best]} alone: p = {fit.fitted.p_value(fit.alone[best]):.2g}; "
            f"against equal weights: p = {fit.fitted.p_value(fit.equal):.2g} (McNemar, held-out pairs)"
        )

    def text(self, judge: str, sources: Sequence[str]) -> str:
        """The template file, in TOML, with the evidence as comments. Raises EvidenceError if one question is left."""
        weights = self.weights
        if len(weights) < 2:
            raise EvidenceError(f"the other questions add nothing to {', '.join(weights)}: ask it alone")
        comments = [
            f"Weights fitted by python -m client.calibrate to {self.fit.pairs} pairs of {json.dumps(list(sources))},",
            f"judged by {json.dumps(judge)}. On {FOLDS} held-out folds:",
            *(
                f"{name}: accuracy {way.accuracy:.4f}, ECE {way.ece:.4f}, Brier {way.brier:.4f}"
                for name, way in self.ways
            ),
            self.verdict,
        ]
        panel = {
            "name": self.name,
            "version": self.version,
            "members": list(weights),
            "weights": list(weights.values()),
        }
        lines = [*(f"# {comment}" for comment in comments), "[[panels]]"]
        return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in panel.items())]) + "\n"


def parse_name(text: str) -> tuple[str, int]:
    """`mine@2` as name and version, 1 if there is none. Raises EvidenceError."""
    match = _NAME.fullmatch(text)
    if match is None or len(text) > _LONGEST or match[1] == "inline":
        raise EvidenceError(
            f"--panel {text}: give a name of up to {_LONGEST} letters, digits and . _ / -, and @2 for version 2"
        )
    return match[1], int(match[2] or 1)


def fit_weights(evidence: Evidence, name: str, seed: int, min_pairs: int) -> FittedPanel:
    """Weights for the one panel that judged. Raises EvidenceError where there is none, or too little to fit to."""
    if len(evidence.panels) != 1:
        raise EvidenceError(
            f"--panel needs judgements by one panel, and there are {len(evidence.panels)} here: give --template with "
            "two or more names, or the folder of a benchmark run with it"
        )
    ((members, samples),) = evidence.panels.items()
    distinct = len({sample.id for sample in samples})
    if distinct < max(min_pairs, FOLDS):
        raise EvidenceError(f"{distinct} pairs are too few to fit weights to: --min-pairs is {min_pairs}")
    fit = fit_panel(samples, seed)
    if fit is None:
        raise EvidenceError("no signal: none of the questions puts chosen answers above rejected ones")
    return FittedPanel(*parse_name(name), members, fit)


def print_panel(console: Console, fitted: FittedPanel, evidence: Evidence, judge: str) -> None:
    """The table: each question alone, equal weights, fitted weights, on the same held-out folds."""
    from rich.table import Table

    caption = (
        f"of {fitted.fit.pairs} pairs, each judged by a fit to the other folds; ECE and Brier of fitted probabilities"
    )
    table = Table(title=f"panel {fitted.name}@{fitted.version} of {judge}", caption=caption)
    table.add_column("asked", overflow="fold")
    for name in ("weight", "accuracy", "ECE", "Brier"):
        table.add_column(name, justify="right")
    weights = fitted.weights
    for name, way in fitted.ways:
        weight = f"{weights.get(name, 0):.{_DECIMALS}f}" if name in fitted.members else ""
        table.add_row(name, weight, f"{way.accuracy:.3f}", f"{way.ece:.3f}", f"{way.brier:.3f}")
    console.print(table)
    notes = [fitted.verdict, *(f"samples left out, {why}: {n}" for why, n in sorted(evidence.left_out.items()))]
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
