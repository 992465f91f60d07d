"""The start and the end of a recipe, which may be one process of several."""

from __future__ import annotations

import sys
from collections.abc import Callable

from accelerate import PartialState


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run `main` on the command line's flags, then leave the process group.

    A process that ends while others still wait for it would take them down with it, and one whose group is still there when
    Python shuts down may be aborted by the threads that serve it.
    """
    main(sys.argv[1:])
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
