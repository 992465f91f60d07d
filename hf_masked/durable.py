"""What was written is on the disk for good: a power cut after these calls undoes nothing from before them.

On Windows they do nothing: there is no handle of a folder to flush.
"""

import os
from pathlib import Path


def flush(*places: Path) -> None:
    """Flush files, or folders' lists of names, that exist.

    Raises: OSError where the disk is full or broken, which some file systems only say now.
    """
    for place in places if os.name == "posix" else ():
        if place.exists():
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def flush_all(folder: Path) -> None:
    """Flush everything in a folder, and the folder; raises as `flush`.

    Cost: the time that the disk takes for what is not on it yet.
    """
    flush(*folder.rglob("*"), folder)
