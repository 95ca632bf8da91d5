"""Packed weights that are recognised and not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_forensics.base_model.storage.interface import Found, Storage
from lora_forensics.errors import BaseModelError
from lora_forensics.tensors import Tensors


@dataclass(frozen=True, slots=True)
class _Scheme:
    name: str
    ends: tuple[str, ...]
    """Ends of tensor names; all must occur."""
    without: str = ""
    """An end that must not occur."""
    instead: str = "the 16-bit model that it was made from"
    source: str = ""


_SCHEMES = (
    _Scheme("gptq", (".qweight", ".g_idx"), source="https://arxiv.org/abs/2210.17323"),
    _Scheme("awq", (".qweight", ".qzeros"), ".g_idx", source="https://arxiv.org/abs/2306.00978"),
    _Scheme("svdquant", (".qweight", ".wscales"), source="https://arxiv.org/abs/2411.05007"),
    _Scheme(
        "compressed-tensors", (".weight_packed",), source="https://github.com/vllm-project/compressed-tensors"
    ),
    _Scheme("zero-point", (".weight_zero_point",), source="https://github.com/vllm-project/compressed-tensors"),
    _Scheme("nvfp4", (".weight_scale_2",), source="https://github.com/NVIDIA/TensorRT-Model-Optimizer"),
    _Scheme(
        "mxfp4", ("_blocks", "_scales"), instead="the bfloat16 model (gpt-oss: a repository named -bf16)",
        source="https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
    ),
    _Scheme("exl2", (".q_weight", ".q_scale"), source="https://github.com/turboderp-org/exllamav2"),
    _Scheme("hqq", (".W_q",), source="https://github.com/mobiusml/hqq"),
    _Scheme("aqlm", (".codes", ".codebooks"), source="https://arxiv.org/abs/2401.06118"),
    _Scheme("quanto", (".weight._data",), source="https://github.com/huggingface/optimum-quanto"),
    _Scheme("torchao", ("_weight_qdata",), source="https://github.com/pytorch/ao"),
)  # fmt: skip


def _finder(scheme: _Scheme) -> Callable[[Tensors], Iterator[Found]]:
    def find(tensors: Tensors) -> Iterator[Found]:
        examples = [next((name for name in tensors.infos if name.endswith(end)), None) for end in scheme.ends]
        excluded = scheme.without and any(name.endswith(scheme.without) for name in tensors.infos)
        if all(examples) and not excluded:
            raise BaseModelError(
                f"the base model is packed as {scheme.name} (it has {examples[0]}), which is not read",
                f"pass {scheme.instead} with --base",
            )
        return iter(())

    return find


STORAGES = tuple(
    Storage(scheme.name, f"recognised and refused; pass {scheme.instead}", scheme.source, _finder(scheme))
    for scheme in _SCHEMES
)
