"""Results as json lines, one row a line, written as they come."""

import json


def rows_in(path):
    """Rows of earlier runs; a line that was cut off does not count."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(path, row):
    """Write a row, on a line of its own whatever a killed run has left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    cut = before and not before.endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(row) + "\n")
