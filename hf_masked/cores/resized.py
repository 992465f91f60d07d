"""Cores that are standard models: the full model's class with smaller numbers in its config.

Such a core is built from the smaller config, as `from_pretrained` would build it, and then given its tensors: the full
network's own, copies of them, or cuts. So whatever it computes, stock transformers computes after loading it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig, PreTrainedModel

from ..types import Mask, StepInfo
from .base import Core, CoreConfig, Rung, tables
from .cutting import Cutting, Part
from .ladder import RungSampling, choose_rungs
from .modules import parameter_sites

Changes = dict[str, dict[str, Any]]
"""Name of a sub-config ("" for the model's own) -> field -> new value."""
Value = Callable[[str], torch.Tensor]


class ResizedCore(Core):
    """A core whose config is the full model's with some `changes`.

    Args:
        full: the full network.
        config: how the core is made.
        changes: what its model config says otherwise.
        part: name of a tensor in the core -> the part of the full network's tensors that it is.
    """

    def __init__(self, full: PreTrainedModel, config: CoreConfig, changes: Changes, part: Callable[[str], Part]):
        self.changes = changes
        self.rungs: dict[str, ResizedCore] = {}
        self._running: ResizedCore | None = None
        model = skeleton(full, changes)
        self.parts = {name: part(name) for name in _names(model)}
        theirs = _tensors(full)
        for name, place in _tensors(model).items():
            _check(type(full).__name__, name, place, self.parts[name], theirs)
        shared = config.coupling == "shared"
        _fill(model, lambda name: self._start(theirs[self.parts[name].name], self.parts[name], shared))
        model.train(full.training)
        if hasattr(full, "generation_config"):
            model.generation_config = full.generation_config
        super().__init__(model, config)
        if shared:
            self._share_whole(theirs)

    @staticmethod
    def _start(whole: torch.Tensor, part: Part, shared: bool) -> torch.Tensor:
        if shared and not part.kept and isinstance(whole, nn.Parameter):
            return whole
        own = part.of(whole.detach()).clone()
        return nn.Parameter(own, whole.requires_grad) if isinstance(whole, nn.Parameter) else own

    def _share_whole(self, theirs: dict[str, torch.Tensor]) -> None:
        """Let the layers that have a part of a tensor hold the full network's whole one, and cut it when they run."""
        for module, path, name, _ in list(parameter_sites(self.model)):
            part = self.parts[f"{path}.{name}".lstrip(".")]
            if part.kept:
                module._parameters[name] = theirs[part.name]  # type: ignore[assignment]
                parametrize.register_parametrization(module, name, Cutting(part), unsafe=True)

    # ---- a ladder: smaller cores of this one, on its parameters ----

    def _hold(self, rungs: dict[str, "ResizedCore"]) -> None:
        """Take in smaller cores by name, increasing, each of coupling "shared" with this one or with its full
        network."""
        self.rungs = rungs
        self._whole, self._parameters = tables(self.model), dict(self.model.named_parameters())

    @property
    def nested(self) -> dict[str, Rung]:
        return {name: name for name in self.rungs}

    def rung(self, info: StepInfo) -> Rung | None:
        return self.rungs_of(info)[-1]

    def rungs_of(self, info: StepInfo) -> list[Rung | None]:
        if not self.rungs:
            return [None]
        sampling: RungSampling = self.config.rung_sampling  # type: ignore[attr-defined]
        return [[*self.rungs, None][chosen] for chosen in choose_rungs(1 + len(self.rungs), sampling, info)]

    @contextmanager
    def at_rung(self, rung: Rung | None) -> Iterator[None]:
        if not self.rungs or (rung is not None and rung not in self.rungs):
            with super().at_rung(rung):
                yield
            return
        before = self._running
        self._run_as(None if rung is None else self.rungs[str(rung)])
        try:
            yield
        finally:
            self._run_as(before)

    def _run_as(self, rung: "ResizedCore | None") -> None:
        vars(self.model).update(self._whole if rung is None else tables(rung.model))
        self.model.train(self.model.training)
        self._running = rung

    def _ladder_fingerprint(self) -> dict[str, Any]:
        sampling = getattr(self.config, "rung_sampling", None)
        rungs = {name: rung.fingerprint() for name, rung in self.rungs.items()}
        return {"ladder": {"rungs": rungs, "rung_sampling": sampling}} if rungs else {}

    @property
    def networks(self) -> list[PreTrainedModel]:
        return [self.model, *(rung.model for rung in self.rungs.values())]

    def all_parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters if self.rungs else super().all_parameters()

    def tensors(self, full: nn.Module) -> dict[str, torch.Tensor]:
        """Also the running statistics of every rung, which are of its own activations."""
        own = {name: _buffers(rung.model) for name, rung in self.rungs.items()}
        rungs = {f"core-{name}.{buffer}": tensor for name, held in own.items() for buffer, tensor in held.items()}
        return super().tensors(full) | rungs

    # ---- the contract ----

    def split(self, full: PreTrainedModel) -> list[nn.Parameter]:
        """Copies of the full network's values as they are now; with coupling "shared" they are the same already."""
        theirs = _tensors(full)
        with torch.no_grad():
            for name, mine in _tensors(self.model).items():
                if name in self.parts and mine is not theirs[self.parts[name].name]:
                    mine.copy_(self.parts[name].of(theirs[self.parts[name].name]))
        for rung in self.rungs.values():  # whose buffers are their own
            rung.split(full if self.config.coupling == "shared" else self.model)
        return list(self.own_parameters(full).values())

    def extract(self, core_format: str) -> PreTrainedModel:
        extracted = skeleton(self.model, {})

        def value(name: str) -> torch.Tensor:
            path, _, last = name.rpartition(".")
            mine = getattr(self.model.get_submodule(path), last)
            copied = mine.detach().clone()
            return copied if name in _buffers(extracted) else nn.Parameter(copied)

        _fill(extracted, value)
        if hasattr(self.model, "generation_config"):
            extracted.generation_config = copy.deepcopy(self.model.generation_config)
        return extracted.train(self.model.training)

    def weights(self) -> Iterable[torch.Tensor]:
        if self._running is not None:
            yield from self._running.weights()
            return
        buffers = _buffers(self.model)
        for name in self.parts:
            if name not in buffers:
                path, _, last = name.rpartition(".")
                yield getattr(self.model.get_submodule(path), last)

    def counterparts(self, full: nn.Module) -> dict[str, torch.Tensor]:
        theirs = _tensors(full)
        return {name: theirs[part.name] for name, part in self.parts.items()}

    def sync(self, full: nn.Module) -> None:
        """Also lets changes of the full model's config (attention implementation, special tokens, ...) reach the
        core."""
        with self.at_rung(None):
            mine, theirs = sub_configs(self.model.config), sub_configs(full.config)  # type: ignore[arg-type]
            for name, config in mine.items():
                # the core is whole where the full network is sharded
                own = {*self.changes.get(name, {}), *(part for part in mine if part), "distributed_config"}
                vars(config).update({k: v for k, v in vars(theirs[name]).items() if k not in own})
            super().sync(full)
            for rung in self.rungs.values():
                rung.sync(full if self.config.coupling == "shared" else self.model)

    def _inside(self) -> dict[int, Part | None]:
        """id of each parameter that this network runs with -> the part of it that it has; None for all of it."""
        inside: dict[int, Part | None] = {id(p): None for p in self.model.parameters()}
        for name, part in self.parts.items():
            path, _, last = name.rpartition(".")
            lists = getattr(self.model.get_submodule(path), "parametrizations", {})
            if last in lists:
                inside[id(lists[last].original)] = part
        return inside

    def update_mask(self) -> Mask | None:
        inside = {name: rung._inside() for name, rung in self.rungs.items()}
        whole, names = self._inside(), {name: id(p) for name, p in self.model.named_parameters()}
        if not inside and not any(whole.values()):
            return None

        def mask(info: StepInfo, gradients: Any) -> dict[str, torch.Tensor | bool]:
            has = inside.get(str(self.rung(info)), whole)
            parts = {name: has.get(names[name]) for name in gradients}
            cut = {name: part.inside(gradients[name]) for name, part in parts.items() if part is not None}
            return cut | {name: False for name in gradients if names[name] not in has}

        return mask


def sub_configs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The config itself as "", and those of its parts by name."""
    return {"": config} | {k: v for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)}


def skeleton(model: PreTrainedModel, changes: Changes) -> PreTrainedModel:
    """A model of the same class and of the changed config, on the meta device.

    Raises: ValueError where no such config exists, or it would not survive being saved and loaded.
    """
    config = copy.deepcopy(model.config)
    try:
        for part, values in changes.items():
            for name, value in values.items():
                setattr(sub_configs(config)[part], name, value)
        type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            made: PreTrainedModel = type(model)(config)
    except Exception as error:  # a config's own rules raise what they like
        raise ValueError(
            f"got a core of {type(model).__name__} with {changes}; needs sizes that its config can say, because stock "
            f"transformers has to load the core; it says: {error}; set other sizes in --core_config"
        ) from error
    return made


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def _names(model: nn.Module) -> list[str]:
    return list(_tensors(model))


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


def _check(class_name: str, name: str, place: torch.Tensor, part: Part, theirs: dict[str, torch.Tensor]) -> None:
    found = theirs.get(part.name)
    shape = None if found is None else tuple(part.of(found.detach()).shape)
    if shape != tuple(place.shape):
        raise ValueError(
            f"got a {class_name} whose {part.name} gives a core tensor of shape {shape}; needs {tuple(place.shape)} "
            f"for {name}, because that is what its class builds from the core's config, and stock transformers has to "
            "load it; the model was changed after it was built: load it anew"
        )


def _fill(model: PreTrainedModel, value: Value) -> None:
    """Put tensors into every place of a skeleton, one for tied places."""
    made: dict[int, Any] = {}
    for path, module in model.named_modules():
        if loose := [name for name, held in vars(module).items() if isinstance(held, torch.Tensor)]:
            raise ValueError(
                f"got a {type(model).__name__} whose {path} holds {loose[0]!r} as a plain tensor; needs parameters "
                "and buffers, because a core is built without values and gets the full network's; set --core low_rank"
            )
        for table in (module._parameters, module._buffers):
            for name, place in table.items():
                if place is not None:
                    if id(place) not in made:
                        made[id(place)] = (place, value(f"{path}.{name}".lstrip(".")))
                    table[name] = made[id(place)][1]
