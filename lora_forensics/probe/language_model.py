"""Loss of a causal language model on held-out texts: base and adapter through peft, the base loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lora_forensics.errors import ScoreError, UsageError
from lora_forensics.probe.interface import ProbeOptions, ScorerSettings, finite
from lora_forensics.probe.loading import PeftSlot, base_folder, base_mark, device_of, first_line, missing, quiet
from lora_forensics.probe.samples import Text, mark, read_texts
from lora_forensics.records import Checkpoint

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
_BYTES = 256
_UNSCORED = -100
"""The label that transformers leaves out of a loss."""

Tokens = tuple[list[int], int]
"""Tokens of a sample, and how many of them are its prompt."""


class LanguageModelScorer:
    """Mean negative log likelihood of a token, in nats, for each text; tokens of a prompt are not scored."""

    name: ClassVar[str] = "held-out texts"
    parallel: ClassVar[bool] = False

    @classmethod
    def wanted(cls, options: ProbeOptions) -> bool:
        """A file was given."""
        return options.held_out is not None and not options.held_out.is_dir()

    def __init__(self, settings: ScorerSettings) -> None:
        """Read the samples.

        Raises:
            UsageError: there are none.
            BaseModelError: the base is no folder of transformers.
        """
        self._path = Path(settings.options.held_out or "")
        self._texts = read_texts(self._path)
        self._files = settings.base
        self._base = base_folder(settings.base, "config.json")
        self._run = settings.run
        self._device = settings.options.device
        self._slot: PeftSlot | None = None
        self._tokens: list[Tokens] = []
        self._cut = 0

    @property
    def identity(self) -> str:
        """The texts and the base model."""
        return mark(self.name, *self._texts, base_mark(self._files))

    @property
    def what(self) -> str:
        """Loss on so many texts of a file."""
        number = len(self._texts)
        cut = f", {self._cut} of them cut at the model's length" if self._cut else ""
        return f"loss on {number} held-out text{'' if number == 1 else 's'} of {self._path.name}{cut}"

    def score(self, checkpoint: Checkpoint) -> Sequence[float]:
        """One loss for each text.

        Raises:
            ScoreError: peft cannot load the adapter, or a loss is not finite.
            UsageError: a library is missing, or no text can be read by the model.
        """
        slot = self._ready()
        model = slot.put(checkpoint)
        try:
            return finite([_loss(model, *tokens) for tokens in self._tokens])
        except (RuntimeError, IndexError) as error:  # an index: a token that the model does not have
            raise ScoreError(first_line(error)) from error

    def stop(self) -> None:
        """Nothing runs beside."""

    def _ready(self) -> PeftSlot:
        if self._slot is not None:
            return self._slot
        try:
            from transformers import AutoConfig
        except ImportError as error:
            raise missing("transformers") from error
        try:
            config = AutoConfig.from_pretrained(self._base, local_files_only=True).get_text_config()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "score with a command of your own: --score"
            raise UsageError(f"transformers cannot read {self._base}: {first_line(error)}", hint) from error
        tokenizer = self._tokenizer(config)
        longest = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
        for text in self._texts:
            tokens, prompt = _encode(tokenizer, text)
            self._cut += len(tokens) > longest
            tokens = tokens[:longest]
            if len(tokens) <= max(prompt, 1):
                hint = "shorten its prompt" if prompt else "a text needs two tokens or more"
                raise UsageError(f"--held-out {self._path}: a sample has nothing to score in {longest} tokens", hint)
            self._tokens.append((tokens, prompt))
        self._slot = PeftSlot(self._model, device_of(self._device))
        return self._slot

    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        with quiet():
            try:
                model = AutoModelForCausalLM.from_pretrained(self._base, local_files_only=True, dtype="auto")
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                hint = "score with a command of your own: --score"
                raise UsageError(f"transformers cannot load {self._base}: {first_line(error)}", hint) from error
        return model.to(device_of(self._device)).eval()

    def _tokenizer(self, config: Any) -> Any:
        """Of the run, which may have added tokens; else the base's; bytes where a base of 256 symbols has none."""
        folders = [*(c.path.parent for c in reversed(self._run.checkpoints)), self._run.path, self._base]
        for folder in dict.fromkeys(folders):
            if any((folder / name).is_file() for name in _TOKENIZER):
                from transformers import AutoTokenizer

                try:
                    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
                except (OSError, ValueError, ImportError) as error:
                    raise UsageError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
        if config.vocab_size == _BYTES:
            return None
        raise UsageError(f"no tokenizer lies in {self._base} or beside the checkpoints", "pass --base with its folder")


def _encode(tokenizer: Any, text: Text) -> Tokens:
    """Tokens of prompt and completion; a prompt alone tells how many belong to it."""
    if tokenizer is None:
        opening = text.prompt.encode()
        body = text.text or "\n".join(str(message["content"]) for message in text.messages)
        return [*opening, *body.encode()], len(opening)
    if text.messages:
        prompt = _chat(tokenizer, text.messages[:-1], opened=True) if len(text.messages) > 1 else []
        return _with_prompt(_chat(tokenizer, text.messages, opened=False), prompt)
    whole = tokenizer(text.prompt + text.text)["input_ids"]
    if not text.prompt:
        return list(whole), 0
    return _with_prompt(list(whole), list(tokenizer(text.prompt)["input_ids"]))


def _chat(tokenizer: Any, messages: Sequence[dict[str, Any]], opened: bool) -> list[int]:
    try:
        found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=opened, tokenize=False)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"the tokenizer has no chat template for messages: {first_line(error)}") from error
    return list(tokenizer(found, add_special_tokens=False)["input_ids"])


def _with_prompt(whole: list[int], prompt: list[int]) -> Tokens:
    """As far as the prompt's own tokens are the first of the whole: the last may merge with what follows."""
    same = next((at for at, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(prompt))
    return whole, same


def _loss(model: Any, tokens: list[int], prompt: int) -> float:
    import torch

    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    labels = ids.clone()
    labels[:, :prompt] = _UNSCORED
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=_UNSCORED))
