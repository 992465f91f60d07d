"""The files of an export in its folder, and how a new one takes their place: no moment of it loads as a mixture."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .durable import flush

# what an export writes for from_pretrained to read; nothing of another name is ever removed
_MODEL = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # in the folders of cores only
# the files without which nothing loads: gone first and back last, so that no mixture of two exports ever loads
_ENTRIES = ("config.json", "adapter_config.json")
# where cores lie is written down, so that a later export takes their place, and nobody else's folder's
LISTING = "hf_masked_cores.json"
# a core's own name, or that of its kind, and for the smaller ones of a ladder the rung
_CORE_FOLDER = re.compile(r"[a-z][a-z0-9_]*(-([rnhked][0-9.]+(e-[0-9]+)?)+)?")


def check_writable(out: str | os.PathLike[str]) -> Path:
    """The folder as a path, made if need be.

    Raises: NotADirectoryError or PermissionError where nothing can be written.
    """
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"got the output folder {path}; needs a folder, because {error.filename} is a file; set --output_dir"
        ) from None
    except OSError as error:
        raise PermissionError(
            f"got the output folder {path}; needs one that can be written, because models are saved there "
            f"({error.strerror}); set --output_dir"
        ) from None
    return path


def written(folder: Path, of_core: bool) -> list[Path]:
    """What there is of what an export writes into a folder for from_pretrained to read."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if _MODEL.fullmatch(path.name) or (of_core and path.name in ADAPTER)]


def _check_replaceable(files: Iterable[Path]) -> None:
    """Refuse, before anything is removed, to put files where none can be put.

    Raises: IsADirectoryError; as `check_writable`.
    """
    places = set(files)
    for path in sorted(places):
        if path.is_dir():
            raise IsADirectoryError(
                f"got the folder {path}; needs a file or nothing there, because an export writes one of that name; "
                "move it, or set --output_dir"
            )
    for folder in sorted({path.parent for path in places}):
        check_writable(folder)


def exported_cores(out: str | os.PathLike[str]) -> list[str]:
    """The folders of an export in which its cores lie, each followed by the smaller ones of its ladder."""
    return sorted(
        name for name in own_folders(Path(out)) if any(Path(out, name, entry).is_file() for entry in _ENTRIES)
    )


def own_folders(target: Path) -> set[str]:
    """The folders of cores that exports wrote here."""
    try:
        told = json.loads((target / LISTING).read_text(encoding="utf-8"))["folders"]
        return {name for name in told if isinstance(name, str) and _CORE_FOLDER.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _note_folders(target: Path, staging: Path, folders: set[str]) -> None:
    """Write down, for good, which folders are an export's; nothing where there are none."""
    if folders:
        (staging / LISTING).write_text(json.dumps({"folders": sorted(folders)}, indent=2), encoding="utf-8")
        flush(staging / LISTING)
        os.replace(staging / LISTING, target / LISTING)
    else:
        (target / LISTING).unlink(missing_ok=True)
    flush(target)


@contextmanager
def staging_in(target: Path) -> Iterator[Path]:
    for abandoned in target.glob(".export-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    # inside the target, so that moving a file is a rename on one file system
    folder = Path(tempfile.mkdtemp(prefix=".export-", dir=target))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def swap_in(staging: Path, target: Path) -> None:
    """Exchange the files of two exports so that no moment of it loads as a mixture, nor what a power cut leaves of
    it."""
    new = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    old, made = own_folders(target), {path.parts[0] for path in new if path.name in _ENTRIES and len(path.parts) == 2}
    folders = [target, *(target / name for name in sorted(old | made))]
    stale = [path for folder in folders for path in written(folder, of_core=folder != target)]
    _check_replaceable([target / LISTING, *(target / path for path in new), *stale])
    if old | made:
        # before any of them is there, and until none of the old ones is
        _note_folders(target, staging, old | made)
    for path in (path for path in stale if path.name in _ENTRIES):
        path.unlink()
    flush(*folders)
    for path in (path for path in stale if path.name not in _ENTRIES):
        path.unlink()
    entries = sorted((path for path in new if path.name in _ENTRIES), key=lambda path: path.parent == Path())
    for some in ([path for path in new if path not in entries], entries):
        for relative in some:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / relative, target / relative)
        flush(*{target / path.parent for path in some}, target)
    if old - made:
        _note_folders(target, staging, made)
