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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_forensics.errors import CheckpointError, LoraForensicsError

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIX = "base_model.model."
"""What peft writes before the path of a module."""

_NO_WEIGHT = "changes no weight: it learns what goes into the model beside the input"
_NOT_MERGED = {
    "LILY": "is routed by the input",
    "POLY": "mixes its factors by the task",
    "SHADOW": "is a second path beside the layers, driven by the input",
    "XLORA": "mixes other adapters by the input",
}
"""Types with no one change of the weight, and why."""

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

_UNFIT = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What peft and torch raise over a configuration, a state or a layer that they cannot use."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that the adapter changes, as the base stores its weight."""

    shape: tuple[int, ...]
    """One number for a norm, two for a linear layer or an embedding, three to five for a convolution."""
    transposed: bool = False
    """Stored in x out (transformers' Conv1D)."""
    embedding: bool = False
    bias: bool = False


class Merger:
    """One module of an adapter: its change at any checkpoint, by peft's own merge."""

    def __init__(
        self,
        config: Mapping[str, Any],
        layers: Mapping[str, Layer],
        path: str,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        ordered: bool = False,
    ) -> None:
        """Build the layers once, for all checkpoints.

        Args:
            config: adapter_config.json.
            layers: every layer that the adapter changes, by its path (a module's name less `PREFIX`).
            path: the one to look at.
            weight: its weight, as the base stores it.
            bias: its bias; some kinds decompose both together.
            ordered: `layers` has the order in which the model holds them. Otherwise `change` refuses what depends on it.

        Raises:
            CheckpointError: peft builds no such adapter on these layers.
            LoraForensicsError: peft is not installed.
        """
        tuner = _mapping().PEFT_TYPE_TO_TUNER_MAPPING[config["peft_type"]]
        prepares = tuner.uses_shared_state or "_pre_injection_hook" in vars(tuner)
        one = {path: layers[path]}
        self._path = path
        self._by_name = False
        self._weight, self._bias = weight.float(), None if bias is None else bias.float()
        with _as_ours(path):
            try:
                self._models = [self._build(config, layers if prepares else one)]
                if prepares and not ordered:
                    self._models.append(self._build(config, dict(reversed(layers.items()))))
            except _UNFIT:
                if not prepares:
                    raise
                # decomposes the weight of every layer: possible with this one if what they share is in the checkpoint
                self._by_name = True
                self._models = [self._build(config, one)]

    def change(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Merged less base: the weight's change as the base stores it, and the bias' where it has one. float64.

        Args:
            tensors: one checkpoint's tensors of the module and those that all modules share, by their names in the file.

        Raises:
            CheckpointError: they are not what this configuration makes, or do not determine the change.
        """
        with _as_ours(self._path):
            first, *others = [self._merged(model, tensors) for model in self._models]
        for other in others:
            if not first[0].equal(other[0]):
                raise CheckpointError(
                    f"{self._path}: its tensors depend on the order of the model's layers, which no file here tells",
                    "save the adapter with its indices or projections",
                )
        return first

    def _build(self, config: Mapping[str, Any], layers: Mapping[str, Layer]) -> Any:
        import torch
        from peft import get_peft_model

        root = torch.nn.Module()
        for path, layer in layers.items():
            parent = root
            *names, last = path.split(".")
            for name in names:
                if name not in dict(parent.named_children()):
                    parent.add_module(name, torch.nn.Module())
                parent = parent.get_submodule(name)
            with torch.device("meta"):
                parent.add_module(last, _module(layer))
        for name, parameter in list(root.named_parameters()):
            path, _, role = name.rpartition(".")
            empty = torch.tensor(torch.nan).expand(parameter.shape)
            given = {"weight": self._weight, "bias": self._bias}[role] if path == self._path else None
            owner = root.get_submodule(path)
            setattr(owner, role, torch.nn.Parameter(empty if given is None else given.clone(), requires_grad=False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return get_peft_model(root, _configuration(config, layers))

    def _merged(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        import torch
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        names = get_peft_model_state_dict(model).keys()
        own = {name for name in names if name.startswith(f"{PREFIX}{self._path}.")}
        shared = {name for name in names if not name.startswith(PREFIX)}
        if missing := sorted((own | shared) - tensors.keys()):
            raise CheckpointError(f"{self._path}: {', '.join(missing)} is not in the checkpoint", "")
        state = {name: tensors[name] for name in own | shared}
        set_peft_model_state_dict(model, state)
        tuner = model.base_model
        parent, _, last = self._path.rpartition(".")
        layer = tuner.model.get_submodule(self._path)
        if self._by_name:
            if not shared or not all(last in name for name in shared):
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
            raise CheckpointError(f"{self._path}: its change rests on the weights of other layers", "")
        return change, None if self._bias is None else base.bias.detach() - self._bias.double()


def not_a_weight(peft_type: str) -> str | None:
    """Why an adapter of this type is no change of weights; None where peft can merge it.

    Raises:
        LoraForensicsError: peft is not installed.
    """
    mapping = _mapping()
    if peft_type not in mapping.PEFT_TYPE_TO_TUNER_MAPPING:
        return f"{peft_type} is no adapter type of this version of peft"
    if peft_type in _NOT_MERGED:
        return f"{peft_type} {_NOT_MERGED[peft_type]}: there is no one change of the weight"
    layers = getattr(mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type], "tuner_layer_cls", None)
    return None if isinstance(layers, type) else f"{peft_type} {_NO_WEIGHT}"


def split(names: Iterable[str], peft_type: str) -> tuple[dict[str, list[str]], list[str]]:
    """Tensor names of an adapter by the path of their module, and the names that its modules share.

    A path is what lies between `PREFIX` and peft's prefix of the type's tensors; other names are left out.
    """
    prefix = _mapping().PEFT_TYPE_TO_PREFIX_MAPPING[peft_type]
    begin = "." + (prefix if prefix == peft_type.lower() + "_" else prefix.partition("_")[0] + "_")
    modules: dict[str, list[str]] = {}
    shared = []
    for name in names:
        path, found, _ = name.rpartition(begin)
        if found and path.startswith(PREFIX):
            modules.setdefault(path.removeprefix(PREFIX), []).append(name)
        elif found and path == PREFIX.partition(".")[0]:
            shared.append(name)
    return modules, shared


def _mapping() -> Any:
    try:
        from peft import mapping
    except ImportError as error:
        raise LoraForensicsError(
            "this kind of adapter is read through peft, which is not installed", "pip install lora-forensics[peft]"
        ) from error
    return mapping


def _configuration(config: Mapping[str, Any], layers: Iterable[str]) -> Any:
    kind = _mapping().PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    paths = list(layers)
    here: dict[str, Any] = {**_ELSEWHERE, "target_modules": paths}
    if config.get("feedforward_modules"):
        from peft.tuners.ia3 import IA3Model

        old = kind(target_modules=config["target_modules"], feedforward_modules=config["feedforward_modules"])
        here["feedforward_modules"] = [path for path in paths if IA3Model._check_target_module_feedforward(old, path)]
    settings = {**config, **here}
    return kind(**{name: settings[name] for name in kind.__dataclass_fields__ if name in settings and name != "peft_type"})


def _module(layer: Layer) -> nn.Module:
    from torch import nn

    if layer.embedding:
        return nn.Embedding(*layer.shape)
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(layer.shape[1], layer.shape[0])
    if len(layer.shape) == 1:
        return nn.LayerNorm(layer.shape[0], bias=layer.bias)
    rows, columns, *kernel = layer.shape
    if not kernel:
        return nn.Linear(columns, rows, bias=layer.bias)
    convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    return convolution(columns, rows, tuple(kernel), bias=layer.bias)  # type: ignore[no-any-return]


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
