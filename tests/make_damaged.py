"""Write `tests/data/damaged/`: broken things that people really have, one folder a case, and a table of them.

    python tests/make_damaged.py

Seeded: a second run writes the same tensors. Everything starts from one healthy PEFT checkpoint on a tiny Llama and one
healthy kohya file. The table in the README is made of the docstrings below.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent / "data" / "damaged"
ADAPTER, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"


# --- the healthy things ----------------------------------------------------------------------------------------------


def tiny_llama(hidden: int = 16) -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def write_state(folder: Path) -> None:
    """The trainer_state.json that Trainer leaves at step 10 of 20."""
    history: list[dict[str, float]] = []
    for step, loss, held_out in [(5, 2.5, 2.4), (10, 1.5, 1.6)]:
        place = {"epoch": step / 5, "step": step}
        history.append({"grad_norm": 0.5, "learning_rate": 1e-4, "loss": loss, **place})
        history.append({"eval_loss": held_out, "eval_runtime": 0.1, **place})
    state = {"epoch": 2.0, "eval_steps": 5, "global_step": 10, "log_history": history, "logging_steps": 5}
    state |= {"max_steps": 20, "num_train_epochs": 4, "save_steps": 5, "train_batch_size": 2, "best_metric": None}
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(case: Path, *, trained: bool = True) -> Path:
    """A healthy `checkpoint-10/` of a PEFT run; untrained, its B matrices are zero as PEFT initialises them."""
    folder = case / "checkpoint-10"
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    model.peft_config["default"].base_model_name_or_path = "base"
    torch.manual_seed(2)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["target_modules"].sort()  # PEFT keeps a set
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / "README.md").unlink()  # the model card
    write_state(folder)
    return folder


def write_base(case: Path, *, hidden: int = 16, shard: str = "5GB") -> Path:
    """The base model beside the checkpoints, in `base/`."""
    tiny_llama(hidden).save_pretrained(case / "base", max_shard_size=shard)
    return case / "base"


def kohya_tensors() -> dict[str, Tensor]:
    """Three modules of an SD 1.5 LoRA with kohya's keys."""
    torch.manual_seed(3)
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    tensors = {}
    for name in (f"{block}_attn1_to_q", f"{block}_attn2_to_k", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 16)
        tensors[f"{name}.lora_up.weight"] = torch.randn(16, 2) * 0.1
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def write_kohya(case: Path, tensors: dict[str, Tensor], step: int) -> None:
    """One step file of a kohya run."""
    case.mkdir(parents=True, exist_ok=True)
    metadata = {"ss_session_id": "1", "ss_output_name": "style", "ss_steps": str(step), "ss_epoch": "0"}
    metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    metadata |= {"ss_unet_lr": "0.0001", "ss_learning_rate": "0.0001", "ss_num_batches_per_epoch": "100"}
    save_file(tensors, case / f"style-step{step:08d}.safetensors", metadata)


def cut(file: Path, size: int) -> None:
    """Keep the first `size` bytes of a file."""
    file.write_bytes(file.read_bytes()[:size])


def header_end(file: Path) -> int:
    """Where the data of a safetensors file starts."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


# --- the cases -------------------------------------------------------------------------------------------------------


def healthy(case: Path) -> None:
    """Nothing is wrong here: the PEFT checkpoint and the base that the other cases break."""
    write_base(case)
    write_checkpoint(case)


def truncated(case: Path) -> None:
    """A PEFT adapter cut in the middle of its data (full disk, aborted download); the header is whole."""
    file = write_checkpoint(case) / ADAPTER
    cut(file, (header_end(file) + file.stat().st_size) // 2)


def cut_header(case: Path) -> None:
    """A PEFT adapter cut inside its header."""
    file = write_checkpoint(case) / ADAPTER
    cut(file, header_end(file) // 2)


def empty(case: Path) -> None:
    """A PEFT adapter of zero bytes."""
    cut(write_checkpoint(case) / ADAPTER, 0)


def nan(case: Path) -> None:
    """A kohya run whose step 20 diverged: one lora_up is NaN throughout, another has one NaN; step 10 is whole."""
    tensors = kohya_tensors()
    write_kohya(case, tensors, 10)
    ups = [name for name in tensors if name.endswith("lora_up.weight")]
    tensors[ups[0]] = torch.full_like(tensors[ups[0]], float("nan"))
    tensors[ups[1]][3, 1] = float("nan")
    write_kohya(case, tensors, 20)


def inf(case: Path) -> None:
    """A kohya float16 file whose lora_down overflowed to plus and minus infinity."""
    tensors = {name: tensor.half() for name, tensor in kohya_tensors().items()}
    name = next(name for name in tensors if name.endswith("lora_down.weight"))
    tensors[name][0, 0], tensors[name][1, 5] = float("inf"), float("-inf")
    write_kohya(case, tensors, 10)


def foreign(case: Path) -> None:
    """A whole safetensors file that is no adapter: a textual inversion embedding."""
    case.mkdir(parents=True)
    torch.manual_seed(4)
    save_file({"emb_params": torch.randn(4, 32)}, case / "style-000001.safetensors")


def text_file(case: Path) -> None:
    """A web page saved under the name of a LoRA (a download that needed a login)."""
    case.mkdir(parents=True)
    page = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Please sign in to download.</body></html>\n"
    (case / "style-000001.safetensors").write_text(page, encoding="utf-8", newline="\n")


def lfs_pointer(case: Path) -> None:
    """A git-lfs pointer where the adapter should be (cloned without git-lfs)."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 63}1\nsize 13982744\n"
    (write_checkpoint(case) / ADAPTER).write_text(pointer, encoding="utf-8", newline="\n")


def huge_header(case: Path) -> None:
    """A header length field of 2^62 bytes: a reader that allocates first dies."""
    file = write_checkpoint(case) / ADAPTER
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def zero_b(case: Path) -> None:
    """An untrained adapter as PEFT initialises it: every lora_B is zero, so no module has a cosine."""
    write_checkpoint(case, trained=False)


def missing_shard(case: Path) -> None:
    """A sharded base whose index names a shard that is not there; the adapter is whole."""
    write_checkpoint(case)
    last_shard(write_base(case, shard="18KB")).unlink()


def truncated_shard(case: Path) -> None:
    """A sharded base whose last shard is cut in the middle of its data; the adapter is whole."""
    write_checkpoint(case)
    shard = last_shard(write_base(case, shard="18KB"))
    cut(shard, (header_end(shard) + shard.stat().st_size) // 2)


def last_shard(base: Path) -> Path:
    """The last of the two shards of a base."""
    shards = sorted(base.glob("model-*-of-00002.safetensors"))
    assert len(shards) == 2, "choose another shard size"
    return shards[-1]


def wrong_base(case: Path) -> None:
    """A base with the names that the adapter wants and other shapes (hidden size 24 for 16)."""
    write_checkpoint(case)
    write_base(case, hidden=24)


class Payload:
    """Runs a shell command when it is unpickled; the command only writes a file PWNED into the working directory."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo pwned > PWNED",)


def malicious_pickle(case: Path) -> None:
    """An adapter_model.bin whose pickle runs a shell command (it writes a file PWNED) unless read with weights_only."""
    file = write_checkpoint(case) / ADAPTER
    torch.save({**load_file(file), "payload": Payload()}, file.with_suffix(".bin"))
    file.unlink()


def nan_state(case: Path) -> None:
    """A trainer_state.json with the bare NaN and Infinity that Python's json writes; the adapter is whole."""
    state = write_checkpoint(case) / STATE
    text = state.read_text(encoding="utf-8").replace('"loss": 1.5', '"loss": NaN')
    text = text.replace('"eval_loss": 1.6', '"eval_loss": NaN').replace('"grad_norm": 0.5', '"grad_norm": Infinity')
    state.write_text(text, encoding="utf-8", newline="\n")


def cut_state(case: Path) -> None:
    """A trainer_state.json cut in the middle; the adapter is whole."""
    state = write_checkpoint(case) / STATE
    cut(state, state.stat().st_size // 2)


def bad_config(case: Path) -> None:
    """An adapter_config.json that is not JSON (a merge conflict); the adapter is whole."""
    config = write_checkpoint(case) / CONFIG
    text = config.read_text(encoding="utf-8")
    conflict = '<<<<<<< HEAD\n  "lora_alpha": 4,\n=======\n  "lora_alpha": 8,\n>>>>>>> theirs\n'
    config.write_text(text.replace('  "lora_alpha": 4,\n', conflict), encoding="utf-8", newline="\n")


CASES: list[Callable[[Path], None]] = [
    healthy,
    truncated,
    cut_header,
    empty,
    huge_header,
    text_file,
    lfs_pointer,
    foreign,
    nan,
    inf,
    zero_b,
    missing_shard,
    truncated_shard,
    wrong_base,
    malicious_pickle,
    nan_state,
    cut_state,
    bad_config,
]


def main() -> None:
    """Write every case and the table."""
    lines = ["# Damaged things", "", "Made by `python tests/make_damaged.py`; nothing here is edited by hand.", ""]
    lines += ["| folder | what |", "|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / "damaged"
        for make in CASES:
            make(fresh / make.__name__)
            lines.append(f"| `{make.__name__}/` | {make.__doc__} |")
        (fresh / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        shutil.rmtree(ROOT, ignore_errors=True)
        shutil.copytree(fresh, ROOT)


if __name__ == "__main__":
    main()
