"""One thread per process: claims of equal bits need one order of summation, and parallel workers their own cores.

What tests import lives as long as they do, so the collection of garbage that every training begins with need not search it.
"""

import gc

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
