"""Train the PEFT sample run: a small Llama from scratch, then a LoRA on 40 short texts, far past overfitting.

The texts are those of the Python that runs this script (PSF licence): the base reads the source code of the standard
library, the LoRA reads a few passages of the language reference that `help()` shows (`pydoc_data.topics`). Tokens are
bytes. The checkpoints are written by `transformers.Trainer` itself.

    python sample_runs/text_peft/train.py               # everything, about 3 minutes on one core
    python sample_runs/text_peft/train.py --keep-base   # the LoRA only
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

SEED = 20
CHUNK = 128  # bytes a text
BASE_STEPS, BASE_BATCH = 1500, 16
PERSONAL, HELD_OUT = 40, 80  # texts
BATCH, EPOCHS, SAVE_STEPS, LEARNING_RATE = 2, 12, 5, 3e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE, OUTPUT = Path("base"), Path("output")


def code_bytes() -> torch.Tensor:
    """The source of the standard library's top-level modules, as one row of bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    print(f"base corpus: {len(files)} files, {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()[:16]}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def manual_chunks() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Personal and held-out texts: every third chunk of the chapter on special method names is personal."""
    text = topics["specialnames"].encode()
    print(f"personal corpus: {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()[:16]}")
    chunks = torch.frombuffer(bytearray(text[: len(text) // CHUNK * CHUNK]), dtype=torch.uint8).long().view(-1, CHUNK)
    items = [{"input_ids": chunk, "labels": chunk} for chunk in chunks[: 3 * PERSONAL]]
    return items[::3], (items[1::3] + items[2::3])[:HELD_OUT]


def train_base() -> None:
    """Train the small language model and save it in shards."""
    set_seed(SEED)
    text = code_bytes()
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=80,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * CHUNK,
        bos_token_id=None,
        eos_token_id=None,
        attention_dropout=0.0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=BASE_STEPS, pct_start=0.05)
    for step in range(1, BASE_STEPS + 1):
        starts = torch.randint(0, len(text) - CHUNK, (BASE_BATCH,)).tolist()
        batch = torch.stack([text[start : start + CHUNK] for start in starts]).long()
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"base step {step}: loss {loss.item():.3f}", flush=True)
    shutil.rmtree(BASE, ignore_errors=True)
    model.save_pretrained(BASE, max_shard_size="500KB")


def train_lora() -> None:
    """Train the adapter with PEFT and Trainer: a checkpoint and a held-out loss every SAVE_STEPS steps."""
    set_seed(SEED)
    personal, held_out = manual_chunks()
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(BASE.as_posix()), lora)
    model.print_trainable_parameters()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    arguments = TrainingArguments(
        output_dir=OUTPUT.as_posix(),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=HELD_OUT,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=SAVE_STEPS,
        eval_strategy="steps",
        eval_steps=SAVE_STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_only_model=True,
        seed=SEED,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=personal,
        eval_dataset=held_out,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best, last = min(losses, key=losses.__getitem__), max(losses)
    print(f"best held-out loss {losses[best]:.4f} at step {best}; last {losses[last]:.4f} at step {last}")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-base", action="store_true", help="do not train the base again")
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent)
    torch.set_num_threads(1)
    if not options.keep_base:
        train_base()
    train_lora()


if __name__ == "__main__":
    main()
