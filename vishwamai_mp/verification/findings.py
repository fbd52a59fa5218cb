"""What the checks of a folder found: a line each, as text and as JSON. Needs no torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from vishwamai_mp.config.wording import counted

HOLDS, FAILS, LEFT_OUT = "holds", "fails", "left out"


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: its name.
        status: HOLDS, FAILS or LEFT_OUT.
        seen: what was seen, or why it was left out, in a line.
        figures: the numbers among that.
    """

    check: str
    status: str
    seen: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """All checks of a folder.

    Attributes:
        folder: its path.
        architecture: in its `config.json`.
        parameters: of what was verified.
        layers: that were verified.
        all_layers: that the folder has.
        findings: in the order in which they were made.
        notes: what the import leaves behind.
    """

    folder: str
    architecture: str
    parameters: int
    layers: int
    all_layers: int
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether everything that applies to the folder holds."""
        return bool(self.findings) and all(finding.status != FAILS for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"holds": self.holds, **asdict(self)}

    def render(self) -> str:
        """A table."""
        layers = counted(self.layers, "layer")
        if self.layers < self.all_layers:
            layers = f"the first {self.layers} of {self.all_layers} layers"
        width = max((len(finding.check) for finding in self.findings), default=0)
        return "\n".join(
            [
                f"{self.folder}: {self.architecture}, {self.parameters:,} parameters, {layers}",
                *(f"  {finding.check:{width}}  {finding.status:8}  {finding.seen}" for finding in self.findings),
                *(f"note: {note}" for note in self.notes),
            ]
        )
