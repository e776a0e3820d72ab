"""Results on disk: one JSON file a machine, with its facts and one row a contender."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KEY = ("case", "lengths", "dtype", "setting", "pass", "contender")

Row = dict[str, Any]


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def load(file: Path) -> dict[str, Any]:
    """Read a machine's file: {"machine": facts, "rows": [row, ...]}."""
    return json.loads(file.read_text(encoding="utf-8"))


def save(file: Path, machine: Row, rows: list[Row]) -> None:
    """Write the rows. Older ones stay only if the machine, versions and commit are the same."""
    kept: dict[tuple[str, ...], Row] = {}
    if file.exists():
        before = load(file)
        if before["machine"] == machine:
            kept = {key(row): row for row in before["rows"]}
    kept |= {key(row): row for row in rows}
    file.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine, "rows": list(kept.values())}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
