"""List, download and share pretrained encoders: ``crysldnet weights``."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from crysldnet.artifacts import weights
from crysldnet.console import escaped, note, print_table
from crysldnet.errors import CheckpointError, DataError
from crysldnet.io import cannot_write, replacing, write_atomically

DESCRIPTION = """\
List named encoders, show their model cards, download encoders, and exchange them with the Hugging Face hub.

Use a name in place of a file, as in pretrained=NAME and model=NAME."""

EXAMPLES = """\
examples:
  crysldnet weights
  crysldnet weights show NAME
  crysldnet weights get https://example.org/large.safetensors --sha256 9f2c…
  crysldnet weights pull OWNER/REPOSITORY
  crysldnet weights push runs/pretrain/latest/encoder.safetensors OWNER/REPOSITORY --license mit
"""
FILE, CARD = "encoder.safetensors", "README.md"
"""File names of an encoder in a hub repository."""


def main(argv: Sequence[str]) -> int:
    """Run ``crysldnet weights`` with these arguments; return the exit status.

    Raises:
        CheckpointError: the encoder doesn't exist, or the hub is unavailable.
    """
    arguments = parser().parse_args(list(argv))
    if arguments.action == "show":
        file = _named(arguments.name)
        print(escaped(weights.card_of(file) or f"{file} has no model card"))  # noqa: T201
    elif arguments.action == "get":
        get(arguments.address, arguments.sha256, arguments.name)
    elif arguments.action == "pull":
        pull(arguments.repository, arguments.name, arguments.revision)
    elif arguments.action == "push":
        push(weights.find(arguments.file), arguments.repository, arguments.license)
    else:
        list_them()
    return 0


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments of ``crysldnet weights``."""
    parser = argparse.ArgumentParser("crysldnet weights", description=DESCRIPTION, epilog=EXAMPLES)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="list | show | get | pull | push")
    actions.add_parser("list", help="list named encoders (the default)")
    actions.add_parser("show", help="print a model card").add_argument("name", help="of an encoder")
    get = actions.add_parser("get", help="download an encoder from a web address")
    get.add_argument("address", help="https address of a .safetensors file; a model card beside it ends in .md")
    get.add_argument("--sha256", required=True, help="of the file, as its publisher states it")
    get.add_argument("--name", help="local name; default that of the file")
    pull = actions.add_parser("pull", help="download an encoder from the Hugging Face hub")
    pull.add_argument("repository", help="OWNER/REPOSITORY")
    pull.add_argument("--name", help="local name; default REPOSITORY")
    pull.add_argument("--revision", help="branch, tag or commit")
    share = actions.add_parser("push", help="share an encoder on the Hugging Face hub (first: hf auth login)")
    share.add_argument("file", help="encoder.safetensors, or the name of an encoder")
    share.add_argument("repository", help="OWNER/REPOSITORY; created if missing")
    share.add_argument("--license", required=True, help="of the weights in the hub's words, such as mit or cc-by-4.0")
    return parser


def _named(name: str) -> Path:
    known = weights.named_encoders()
    if name not in known:
        raise CheckpointError(f"{name}: no encoder of that name; available: {', '.join(known) or 'none'}")
    return known[name]


def list_them() -> None:
    """Print a table of the named encoders."""
    from crysldnet.artifacts import model_file  # here and below, because it imports torch, which takes seconds

    rows = []
    for name, file in weights.named_encoders().items():
        info, state = model_file.read(file, "encoder")
        seen = _of(info, "provenance").get("train_crystals")
        rows.append(
            [
                name,
                str(_of(info, "encoder").get("_target_")).rpartition(".")[2],
                f"{sum(t.numel() for t in state.values()):,}",
                f"{file.stat().st_size / 1e6:.1f} MB",
                f"{seen:,}" if isinstance(seen, int) else "not known",
                "with the package" if file.parent == weights.SHIPPED else str(file.parent),
            ]
        )
    if not rows:
        note("no named encoders yet; pull one, or train one with crysldnet pretrain")
        return
    print_table("", ["name", "encoder", "parameters", "size", "pretrained on", "where"], rows)


def _of(info: dict[str, Any], part: str) -> dict[str, Any]:
    """Return part of a file's metadata; empty if missing."""
    found = info.get(part)
    return found if isinstance(found, dict) else {}


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError('the hub needs huggingface_hub: pip install "crysldnet[hub]"') from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_repository(repository: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise CheckpointError(f"{repository!r}: a repository of the hub is OWNER/REPOSITORY")


def pull(repository: str, name: str | None = None, revision: str | None = None) -> Path:
    """Download an encoder from the Hugging Face hub, verify it, and name it.

    Args:
        repository: OWNER/REPOSITORY with encoder.safetensors and a README.md as model card.
        name: name of the encoder; by default that of the repository.
        revision: branch, tag or commit; by default the newest.

    Raises:
        CheckpointError: it can't be downloaded, isn't an encoder, or the name is taken.
    """
    _check_repository(repository)
    out = _free(name or repository.partition("/")[2])
    hub = _hub()
    try:
        files = {file: Path(hub.hf_hub_download(repository, file, revision=revision)) for file in (FILE, CARD)}
    except Exception as error:  # the hub raises many kinds of errors
        raise CheckpointError(f"{repository}: can't be fetched from the hub: {_first_line(error)}") from error
    _keep(files[FILE], files[CARD].read_text(encoding="utf-8"), out, repository)
    return out


def get(address: str, sha256: str, name: str | None = None) -> Path:
    """Download an encoder from a web address, verify it, and name it.

    Args:
        address: https address of a ``.safetensors`` file. If there is a ``.md`` beside it, that is its model card.
        sha256: of the file, 64 hexadecimal digits, with or without ``sha256:`` before them.
        name: name of the encoder; by default that of the file.

    Raises:
        CheckpointError: the sha256 has another form, the file isn't the one announced, isn't an encoder, or the name is
            taken.
        DataError: it can't be downloaded.
    """
    digest = sha256.strip().lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise CheckpointError(f"--sha256 {sha256!r}: a sha256 has 64 hexadecimal digits")
    try:
        file = PurePosixPath(urlsplit(address).path)
    except ValueError as error:
        raise CheckpointError(f"{address}: this isn't a web address: {error}") from error
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{address}: an encoder file ends in .safetensors")
    out = _free(name or unquote(file.stem))
    from crysldnet.data.download import fetch
    from crysldnet.data.store import file_hash

    part = out.with_name(f".{out.name}.{digest[:16]}")
    if not part.exists():
        fetch(address, part, f"get the file elsewhere and use its path: pretrained={file.name}")
    found = file_hash(part)
    if found != digest:
        part.unlink()
        raise CheckpointError(f"{address}: its sha256 is {found}, not {digest}: it was damaged, or it is another file")
    card = part.with_suffix(".md")
    try:
        fetch(urlsplit(address)._replace(path=str(file.with_suffix(".md"))).geturl(), card, "")
        text = card.read_text(encoding="utf-8")
    except (DataError, UnicodeDecodeError):
        text = None
    try:
        _keep(part, text, out, address)
    finally:
        part.unlink()
        card.unlink(missing_ok=True)
    return out


def _free(name: str) -> Path:
    """Return the file for a new name.

    Raises:
        CheckpointError: the name can't be used or is taken.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name in ("none", "auto") or name.endswith(".safetensors"):
        raise CheckpointError(f"--name {name!r}: use letters, digits, _ and -, without .safetensors")
    if name in weights.named_encoders():
        raise CheckpointError(f"{name}: that name is taken by {weights.named_encoders()[name]}; choose another, --name")
    return weights.fetched_folder() / f"{name}.safetensors"


def _keep(file: Path, card: str | None, out: Path, source: str) -> None:
    """Copy a downloaded encoder and its card to the folder of named encoders.

    Raises:
        CheckpointError: it isn't an encoder.
    """
    from crysldnet.artifacts import model_file

    model_file.load_encoder(file)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out.parent, error) from error
    with replacing(out) as partial:
        partial.write_bytes(file.read_bytes())
        if card is not None:
            write_atomically(out.with_suffix(".md"), card)
    note(f"{source} is here as {out.stem}: use pretrained={out.stem}" + ("" if card else "; it has no model card"))


def push(file: Path, repository: str, license: str) -> None:
    """Upload an encoder and its card to the Hugging Face hub.

    Args:
        file: encoder file.
        repository: OWNER/REPOSITORY, created if missing.
        license: license of the weights.

    Raises:
        CheckpointError: it isn't an encoder, or the hub rejects it.
    """
    from crysldnet.artifacts import model_file

    _check_repository(repository)
    if file.is_dir():
        file = file / FILE
    _, info = model_file.load_encoder(file)
    card = _card(file, info, license)
    hub = _hub()
    try:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        operations = [hub.CommitOperationAdd(FILE, file.read_bytes()), hub.CommitOperationAdd(CARD, card.encode())]
        api.create_commit(repository, operations, commit_message=f"Upload {file.stem}")
    except Exception as error:
        raise CheckpointError(f"{repository}: the hub refuses it: {_first_line(error)}") from error
    note(f"{file} is shared as {repository}")


def _card(file: Path, info: dict[str, Any], license: str) -> str:
    """Return the model card for the hub: the existing one with the hub's header, or one generated from the metadata."""
    header = f"---\nlicense: {license}\nlibrary_name: crysldnet\ntags: [crystals, materials]\n---\n\n"
    own = weights.card_of(file)
    if own is not None:
        return header + re.sub(r"\A---\n.*?\n---\n\s*", "", own, flags=re.DOTALL)
    about = _of(info, "provenance")
    lines = [
        f"# {os.fspath(file.stem)}",
        "",
        "A crystal encoder that was pretrained without labels by crysldnet.",
        "",
        f"- encoder: `{info['encoder']['_target_']}`",
        f"- data: {about.get('data', 'not known')}, {about.get('train_crystals', 'an unknown number of')} crystals",
        f"- sha256 of the data: {about.get('data_sha256', 'not known')}",
        f"- code: {about.get('code_version', 'not known')}",
    ]
    return header + "\n".join(lines) + "\n"
