"""Named encoders: those included in the package and downloaded ones.

Each is ``NAME.safetensors`` with a model card ``NAME.md``.
"""

from __future__ import annotations

import os
from pathlib import Path

from crysldnet.console import did_you_mean
from crysldnet.errors import CheckpointError

SHIPPED = Path(__file__).parents[1] / "weights"
VARIABLE = "CRYSLDNET_WEIGHTS"
"""Environment variable with the folder of downloaded encoders."""


def fetched_folder() -> Path:
    """Return the folder of downloaded encoders."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/crysldnet/weights").expanduser()


def named_encoders() -> dict[str, Path]:
    """Return the file of every named encoder; included ones take precedence."""
    return {file.stem: file for folder in (fetched_folder(), SHIPPED) for file in sorted(folder.glob("*.safetensors"))}


def card_of(file: Path) -> str | None:
    """Return the model card next to a file, or None."""
    card = file.with_suffix(".md")
    return card.read_text(encoding="utf-8") if card.is_file() else None


def find(name: str) -> Path:
    """Return the file or folder for a path or encoder name.

    Raises:
        CheckpointError: neither exists.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    known = named_encoders()
    if name in known:
        return known[name]
    if path.suffix or path.parent != Path("."):
        raise CheckpointError(
            f"{name}: no such file; make one with crysldnet pretrain, name one of {', '.join(known) or 'none'} "
            "(crysldnet weights lists them), or start from scratch with pretrained=none"
        )
    hint = did_you_mean(name, known, "crysldnet weights lists them", 0.5)
    raise CheckpointError(f"{name}: no file and no encoder of that name; {hint}")
