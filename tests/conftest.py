"""One thread per process: claims of equal bits need one order of summation, and parallel workers their own cores."""

import torch

torch.set_num_threads(1)
