"""Draw the layers of the package from its imports: python docs/layers.py writes docs/layers.svg.

Every box is a package or module of ``src/crysldnet``, the tools one by one. It lies above all that it imports, as low
as that allows. What it imports is in its tooltip.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "crysldnet"
LAZY = ("__init__",)
"""Imports on first use only, so it lies lowest."""
BOX, GAP, MARGIN, WIDTH = (118, 30), (10, 16), 12, 1060


def box_of(module: str) -> str:
    """Return a module's box, such as ``data`` or ``tools.sweep``."""
    parts = module.split(".")[1:] or ["__init__"]
    return ".".join(parts[:2]) if parts[0] == "tools" and len(parts) > 1 else parts[0]


def imports() -> dict[str, set[str]]:
    """Return each box's imports, including those inside functions."""
    files = {
        path: ".".join(("crysldnet", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in PACKAGE.rglob("*.py")
    }
    boxes = {box_of(module.removesuffix(".__init__")) for module in files.values()}
    found: dict[str, set[str]] = {box: set() for box in boxes - {"tools"}}
    for path, module in files.items():
        own = box_of(module.removesuffix(".__init__"))
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "crysldnet":
                names = [f"{node.module}.{a.name}" if node.module == "crysldnet" else node.module for a in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names if a.name.startswith("crysldnet.")]
            for box in map(box_of, names):
                if own in found and own not in LAZY and box != own:
                    found[own].add(box if box in found else "__init__")
    return found


def levels(found: dict[str, set[str]]) -> list[list[str]]:
    """Return the boxes of each level, the lowest first."""
    height: dict[str, int] = {}

    def of(box: str) -> int:
        if box not in height:
            height[box] = 1 + max((of(other) for other in found[box]), default=-1)
        return height[box]

    rows: list[list[str]] = [[] for _ in range(1 + max(map(of, found)))]
    for box in sorted(found):
        rows[height[box]].append(box)
    return rows


def draw() -> str:
    """Return the drawing."""
    found = imports()
    per_row = (WIDTH - 2 * MARGIN + GAP[0]) // (BOX[0] + GAP[0])
    rows = [row[i : i + per_row] for row in reversed(levels(found)) for i in range(0, len(row), per_row)]
    height = 2 * MARGIN + len(rows) * (BOX[1] + GAP[1]) - GAP[1]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i, row in enumerate(rows):
        left = (WIDTH - len(row) * (BOX[0] + GAP[0]) + GAP[0]) // 2
        for j, box in enumerate(row):
            x, y = left + j * (BOX[0] + GAP[0]), MARGIN + i * (BOX[1] + GAP[1])
            color = "#fde9d0" if box.startswith("tools.") else "#dbe8f6"
            lines += [
                f"<g><title>{escape(box)} imports {escape(', '.join(sorted(found[box])) or 'nothing')}</title>",
                f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="4" fill="{color}" stroke="#456"/>',
                f'<text x="{x + BOX[0] // 2}" y="{y + 20}" font-size="13" text-anchor="middle">'
                f"{escape(box.removeprefix('tools.'))}</text></g>",
            ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (HERE / "layers.svg").write_text(draw())
