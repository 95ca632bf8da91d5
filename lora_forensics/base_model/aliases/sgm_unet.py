"""A UNet in a diffusers folder answers to the names of LDM and SGM (kohya trains SDXL under these)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lora_forensics.base_model.aliases.converters import LDM, ldm_unet_converter, single_file_utils
from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.names import MAIN, numbers_after
from lora_forensics.base_model.slices import ModuleShape
from lora_forensics.base_model.tracers import trace
from lora_forensics.records import RowSlice

_RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")


def aliases(index: NameIndex, _modules: Mapping[str, ModuleShape]) -> Iterator[tuple[str, str, Source]]:
    """Every name that an LDM UNet of this depth could have goes through diffusers' converter; those that arrive at a
    name of this base are the ones it has."""
    main = index.denoiser()
    if "down_blocks.0.resnets.0.conv1.weight" not in main:
        return
    possible = dict.fromkeys((LDM + path for path in _possible(main)), (1,))
    for found in trace(possible, ldm_unet_converter(possible)):
        if found.name.endswith(".weight") and found.name in main:
            native = found.runs[0][0].removeprefix(LDM).removesuffix(".weight")
            yield MAIN, native, Source((RowSlice(main[found.name]),))


def _possible(main: Mapping[str, str]) -> Iterator[str]:
    for group in single_file_utils().DIFFUSERS_TO_LDM_MAPPING["unet"].values():
        yield from group.values()
    resnet = [f"{name}.weight" for name in _RESNET]
    attention = sorted({path.partition(".attentions.")[2].partition(".")[2] for path in main if ".attentions." in path})
    per_block = 1 + len(numbers_after("resnets", (path for path in main if path.startswith("down_blocks.0."))))
    total = per_block * len(numbers_after("down_blocks", main))
    for i in range(1, total):
        down = ["op.weight", "op.bias"] if i % per_block == 0 else []
        yield from (f"input_blocks.{i}.0.{rest}" for rest in (down or resnet))
        yield from (f"input_blocks.{i}.1.{rest}" for rest in attention)
    for i, rests in enumerate((resnet, attention, resnet)):
        yield from (f"middle_block.{i}.{rest}" for rest in rests)
    for i in range(total):
        has_attention = any(path.startswith(f"up_blocks.{i // per_block}.attentions.") for path in main)
        yield from (f"output_blocks.{i}.0.{rest}" for rest in resnet)
        yield from (f"output_blocks.{i}.1.{rest}" for rest in attention if has_attention)
        if (i + 1) % per_block == 0:
            yield from (f"output_blocks.{i}.{1 + has_attention}.conv.{rest}" for rest in ("weight", "bias"))
