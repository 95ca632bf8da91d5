"""Any adapter kind that peft can merge: layers of the base's shapes, the saved state, merge, subtract.

Slow beside a kind of our own (peft builds modules, and the dense change is formed), and right wherever peft is. Only
the layer that is looked at holds numbers. The others are there as shapes where a kind prepares something for all of
them: a shared projection is as large as the largest layer, seeded indices are dealt out in the layers' order. Their
weights are NaN, so that a change which would rest on them cannot pass for a number.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_forensics.adapters.interface import PEFT_PREFIX, Layer, Stack
from lora_forensics.errors import CheckpointError
from lora_forensics.moments import DenseChange, Weight

_ELSEWHERE: Mapping[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,  # or peft asks the hub about it
    "bias": "none",
    "exclude_modules": None,
    "inference_mode": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "progressbar": False,
    "revision": None,
    "task_type": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""Settings that say where an adapter goes, or fetch, or train more beside it: the layers are given here."""

_SHARED = PEFT_PREFIX.partition("model.")[0]
"""Before the names of tensors that all modules share: `base_model.`, but not `PEFT_PREFIX`."""

_UNFIT = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What peft and torch raise over a configuration, a state or a layer that they cannot use."""


class PeftChange(DenseChange):
    """A module's change at many checkpoints."""

    def __init__(self, stack: Stack) -> None:
        """Roles are the tensors' names, those of the module without its own before them."""
        super().__init__(tuple(stack.tensors.values()), stack.lead)
        self._stack = stack
        self._layers = stack.layers()
        self._merger: Merger | None = None

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:
        """Merged less base at one checkpoint."""
        assert weight is not None  # noqa: S101 (`moments` sees to it)
        change = self._merged(index, weight)[0]
        return (change.mT if self._layer.transposed else change).reshape(weight.shape).to(device)

    def bias_change(self, weight: Weight) -> Tensor | None:
        """The same of the bias, (count, rows)."""
        matrix = weight.matrix(torch.device("cpu"))
        found = [self._merged(index, matrix)[1] for index in range(self.count)]
        return torch.stack([bias for bias in found if bias is not None]) if None not in found else None

    @property
    def _layer(self) -> Layer:
        layer = self._layers[self._stack.module]
        if layer is None:
            raise CheckpointError(f"{self._stack.module}: has no weight in the base model")
        return layer

    def _merged(self, index: int, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        module, layer = self._stack.module, self._layer
        if self._merger is None:
            layers = {name.removeprefix(PEFT_PREFIX): below for name, below in self._layers.items()}
            stored = (weight.mT if layer.transposed else weight).reshape(layer.shape).cpu()
            path = module.removeprefix(PEFT_PREFIX)
            self._merger = Merger(self._stack.config.values, layers, path, stored, self._stack.bias())
        tensors = {
            role if role.startswith(_SHARED) else f"{module}.{role}": stacked[index]
            for role, stacked in self._stack.tensors.items()
        }
        return self._merger.change(tensors)


class Merger:
    """One module of an adapter: its change at any checkpoint, by peft's own merge."""

    def __init__(
        self,
        config: Mapping[str, Any],
        layers: Mapping[str, Layer | None],
        path: str,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        """Build the layers once, for all checkpoints.

        Args:
            config: adapter_config.json.
            layers: all that the adapter changes, by path (a module's name less `PEFT_PREFIX`); None if unknown.
            path: the one to look at.
            weight: its weight, as the base stores it.
            bias: its bias; some kinds decompose both together.

        Raises:
            CheckpointError: peft builds no such adapter on these layers, or is not installed.
        """
        tuner = _registered(config, "TUNER")
        shares = getattr(tuner, "uses_shared_state", False) or "_pre_injection_hook" in vars(tuner)
        prepares = shares or bool(config.get("proportional_parameters"))
        self._path = path
        self._weight, self._bias = weight.float(), None if bias is None else bias.float()
        known = {name: layer for name, layer in layers.items() if layer is not None}
        if prepares and len(known) < len(layers):
            raise CheckpointError(f"{path}: shares tensors with modules that have no weight in the base model")
        one = {path: known[path]}
        self._alone = False
        with _as_ours(path):
            try:
                self._models = [self._build(config, known if prepares else one)]
                if prepares:
                    # no file tells the order of the layers in the model: what depends on it shows here
                    self._models.append(self._build(config, dict(reversed(known.items()))))
            except _UNFIT:
                if not prepares:
                    raise
                # decomposes the weight of every layer: possible with this one if what they share is in the checkpoint
                self._alone = True
                self._models = [self._build(config, one)]
            self._own, self._shared = self._names(self._models[0])

    def change(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Merged less base: the weight's change as the base stores it, and the bias' where it has one. float64.

        Args:
            tensors: of one checkpoint, the module's and those that all modules share, by their names in the file.

        Raises:
            CheckpointError: they are not what this configuration makes, or do not determine the change.
        """
        with _as_ours(self._path):
            first, *others = [self._merged(model, tensors) for model in self._models]
        if any(not first[0].equal(other[0]) for other in others):
            raise CheckpointError(
                f"{self._path}: what it does depends on the order of the model's layers, which no file here tells",
                "save the adapter with its indices or projections",
            )
        if first[0].any():
            self._models = self._models[:1]
        return first

    def _build(self, config: Mapping[str, Any], layers: Mapping[str, Layer]) -> Any:
        from peft import get_peft_model

        root = nn.Module()
        for path, layer in layers.items():
            parent = root
            *names, last = path.split(".")
            for name in names:
                if name not in dict(parent.named_children()):
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            with torch.device("meta"):
                parent.add_module(last, _module(layer, bias=path == self._path and self._bias is not None))
        for name, parameter in list(root.named_parameters()):
            path, _, role = name.rpartition(".")
            empty = torch.tensor(torch.nan).expand(parameter.shape)
            given = {"weight": self._weight, "bias": self._bias}.get(role) if path == self._path else None
            owner = root.get_submodule(path)
            setattr(owner, role, nn.Parameter(empty if given is None else given.clone(), requires_grad=False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(root, _configuration(config, layers))
        return model.eval()  # VB-LoRA refuses its short form in training

    def _names(self, model: Any) -> tuple[set[str], set[str]]:
        """Names that peft saves of this module, and of what all share."""
        from peft import get_peft_model_state_dict

        names = get_peft_model_state_dict(model).keys()
        own = {name for name in names if name.startswith(f"{PEFT_PREFIX}{self._path}.")}
        return own, {name for name in names if not name.startswith(PEFT_PREFIX)}

    def _merged(self, model: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        from peft import set_peft_model_state_dict

        wanted = self._own | self._shared
        if missing := sorted(wanted - tensors.keys()):
            raise CheckpointError(f"{self._path}: {', '.join(missing)} is not in the checkpoint")
        state = {name: tensors[name] for name in wanted}
        set_peft_model_state_dict(model, state)
        tuner = model.base_model
        parent, _, last = self._path.rpartition(".")
        layer = tuner.model.get_submodule(self._path)
        if self._alone:
            if not self._shared or not all(last in name for name in self._shared):
                raise CheckpointError(
                    f"{self._path}: it needs the weights of all layers at once",
                    "save the adapter with its projections (`save_projection`)",
                )
            # what the layer derived from its own weight alone is derived again from what was shared
            config = tuner.peft_config["default"]
            tuner._create_and_replace(
                config, "default", layer, last, tuner.model.get_submodule(parent), current_key=self._path
            )
            set_peft_model_state_dict(model, state)
        layer = copy.deepcopy(layer).double()
        with torch.no_grad():
            layer.merge()
        base = layer.get_base_layer()
        change = base.weight.detach() - self._weight.double()
        if not change.isfinite().all() and all(t.isfinite().all() for t in (self._weight, *state.values())):
            raise CheckpointError(f"{self._path}: its change rests on the weights of other layers")
        return change, None if self._bias is None else base.bias.detach() - self._bias.double()


def _registered(config: Mapping[str, Any], what: str) -> Any:
    """The class that peft has for the configured type: its TUNER or its CONFIG."""
    try:
        from peft import __version__, mapping
    except ImportError as error:
        message = "this kind of adapter is read through peft, which is not installed: pip install lora-forensics[peft]"
        raise CheckpointError(message) from error
    name = str(config["peft_type"]).upper()
    classes = getattr(mapping, f"PEFT_TYPE_TO_{what}_MAPPING")
    if name not in classes:
        raise CheckpointError(f"{name} adapters are read through peft, and peft {__version__} does not know them")
    return classes[name]


def _configuration(config: Mapping[str, Any], layers: Iterable[str]) -> Any:
    kind = _registered(config, "CONFIG")
    settings = {**config, **_ELSEWHERE, "target_modules": list(layers)}
    return kind(
        **{name: settings[name] for name in kind.__dataclass_fields__ if name in settings and name != "peft_type"}
    )


def _module(layer: Layer, *, bias: bool) -> nn.Module:
    if layer.embedding:
        return nn.Embedding(layer.shape[0], layer.shape[1])
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        conv1d: Any = Conv1D
        return conv1d(layer.shape[1], layer.shape[0])  # type: ignore[no-any-return]
    rows, columns, *kernel = layer.shape
    if not kernel:
        return nn.Linear(columns, rows, bias=bias)
    convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    return convolution(columns, rows, tuple(kernel), bias=bias)  # type: ignore[no-any-return]


@contextmanager
def _as_ours(path: str) -> Iterator[None]:
    """Without peft's warnings, and with its errors as ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except _UNFIT as error:
            raise CheckpointError(
                f"{path}: peft cannot rebuild it: {str(error) or type(error).__name__}",
                "compare the installed version of peft with `peft_version` in adapter_config.json",
            ) from error
