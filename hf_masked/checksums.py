"""`checkpoint-N/checksums.json`: CRC-32 of every safetensors file, since a flipped bit in a tensor's values shows
nowhere else.

safetensors checks the shapes and the length of a file, and JSON the rest. An export has none: stock tools would not
read it.
"""

import json
import zlib
from pathlib import Path

from .state_files import reading

NAME = "checksums.json"
_CHUNK = 1 << 20


def write_checksums(checkpoint: str | Path) -> None:
    """Write down what the files of a checkpoint, all of them there, hold.

    Cost: reads them once, mostly from memory, at about 1 GB/s.
    """
    (Path(checkpoint) / NAME).write_text(json.dumps(_sums(Path(checkpoint)), indent=2), encoding="utf-8")


def check_checksums(checkpoint: str | Path) -> None:
    """Refuse a checkpoint of which a file is not as it was saved.

    Raises: ValueError.

    Cost: reads every file once.
    """
    folder = Path(checkpoint)
    with reading(folder / NAME):
        saved = dict(json.loads((folder / NAME).read_text(encoding="utf-8")))
    with reading(folder):
        found = _sums(folder)
    if changed := sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name)):
        raise ValueError(
            f"got {folder / changed[0]}, which is not as it was saved; needs the CRC-32 in {NAME}, because training "
            "would go on from other numbers; it is damaged or was changed: name another checkpoint"
        )


def _sums(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): _crc(file) for file in sorted(folder.rglob("*.safetensors"))}


def _crc(file: Path) -> str:
    total = 0
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"
