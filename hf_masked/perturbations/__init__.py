"""dx rules, one idea per file: where the gradient of an update is taken."""

from .drop_connect import DropConnect
from .extragradient import Extragradient
from .gaussian import Gaussian
from .layer_drop import LayerDrop
from .prune import Prune
from .quantize import Quantize
from .sam import Asam, Sam
from .stale import Stale

__all__ = ["Asam", "DropConnect", "Extragradient", "Gaussian", "LayerDrop", "Prune", "Quantize", "Sam", "Stale"]
