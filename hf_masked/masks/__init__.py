"""p rules: functions of (StepInfo, gradients) to what is kept, one idea per file."""

from .blocks import CyclicBlocks, FreezeOut, RandomBlocks, block_of
from .compose import Chain, Complement
from .entries import RandK, RandomCoordinates, TopK
from .error_feedback import ErrorFeedback
from .importance import Fisher, Magnitude
from .names import Fixed, Parameters
from .sparse_training import DynamicSparsity, GradualPruning

__all__ = [
    "Chain",
    "Complement",
    "CyclicBlocks",
    "DynamicSparsity",
    "ErrorFeedback",
    "Fisher",
    "Fixed",
    "FreezeOut",
    "GradualPruning",
    "Magnitude",
    "Parameters",
    "RandK",
    "RandomBlocks",
    "RandomCoordinates",
    "TopK",
    "block_of",
]
