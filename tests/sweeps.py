"""A real sweep: small networks that peft adapts to noisy labels at several ranks and rates, saved as a Trainer does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from factories import library
from safetensors.torch import save_file
from torch import nn

WIDTH, CLASSES, BATCH, STEPS, EVERY = 48, 10, 16, 200, 10


class Network(nn.Module):
    """Three blocks with a projection each way."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "network"}
        linear = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6)]
        pairs = zip(linear[::2], linear[1::2], strict=True)
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": query, "up_proj": up}) for query, up in pairs)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        for layer in self.layers:
            for part in layer.children():
                x = x + torch.tanh(part(x))
        return self.head(x)


def sweep(folder: Path, ranks: tuple[int, ...] = (2, 8, 32), rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)) -> Path:
    """Train all combinations; one more has four times the data."""
    torch.manual_seed(0)
    base = Network()
    folder.mkdir(parents=True)
    save_file(base.state_dict(), folder / "base.safetensors")
    for rank in ranks:
        for rate in rates:
            _train(base, folder / "runs" / f"r{rank}-lr{rate:g}", rank, rate, 64)
    _train(base, folder / "runs" / "more-data", ranks[-1], rates[0], 256)
    return folder / "runs"


def _data(many: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(many, WIDTH, generator=random)
    true = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(99))
    return x, (x @ true + 2 * torch.randn(many, CLASSES, generator=random)).argmax(1)


def _train(base: Network, folder: Path, rank: int, rate: float, many: int) -> None:
    peft: Any = library("peft")
    torch.manual_seed(1)
    network = Network()
    network.load_state_dict(base.state_dict())
    model = peft.get_peft_model(
        network, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "up_proj"])
    )
    model.peft_config["default"].base_model_name_or_path = "../base.safetensors"
    (x, y), (held, truth) = _data(many, 5), _data(256, 1000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    log: list[dict[str, float]] = []
    for step in range(1, STEPS + 1):
        at = {"step": step, "epoch": step * BATCH / many, "learning_rate": rate * (1 - step / (1.2 * STEPS))}
        optimizer.param_groups[0]["lr"] = at["learning_rate"]
        rows = torch.randint(0, many, (BATCH,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append({**at, "loss": loss.item()})
        if step % EVERY == 0:
            with torch.no_grad():
                log.append({**at, "eval_loss": nn.functional.cross_entropy(model(held), truth).item()})
            saved = folder / f"checkpoint-{step}"
            model.save_pretrained(saved, save_embedding_layers=False)
            state = {"global_step": step, "epoch": at["epoch"], "log_history": log, "train_batch_size": BATCH}
            (saved / "trainer_state.json").write_text(json.dumps({**state, "max_steps": STEPS}))
