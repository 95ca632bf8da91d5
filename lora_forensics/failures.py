"""Failures that people report in the trackers of trainers and tools, and the rules that catch them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """One sort of report."""

    what: str
    threads: tuple[str, ...]
    """owner/repository#number, or !number for a pull request."""
    rules: tuple[str, ...] = ()
    note: str = ""
    """What answers it instead of a rule, or why none can."""

    def links(self) -> list[tuple[str, str]]:
        """Name and address of each thread."""
        found = []
        for thread in self.threads:
            kind = "pull" if "!" in thread else "issues"
            repository, number = thread.replace("!", "#").split("#")
            found.append(
                (f"{repository.partition('/')[2]} {number}", f"https://github.com/{repository}/{kind}/{number}")
            )
        return found


FAILURES: tuple[Failure, ...] = (
    Failure("which epoch is it?", ("kohya-ss/sd-scripts#193", "hiyouga/LlamaFactory#2062"), (), "the verdict itself"),
    Failure(
        "stop early; the final file is the last, not the best",
        ("bmaltais/kohya_ss#1593", "ml-explore/mlx-lm!331"),
        ("last-is-past",),
        "after the fact: it reads saved checkpoints and stops no training",
    ),
    Failure(
        "no validation data, or its loss does not rise in time",
        ("Nerogar/OneTrainer!715",),
        ("weak-evidence",),
        "`probe` needs four samples",
    ),
    Failure(
        "the training loss misleads",
        ("Nerogar/OneTrainer#859", "huggingface/finetrainers#288"),
        (),
        "no rule reads the training loss; reports show it beside CS",
    ),
    Failure(
        "which number means overtrained?",
        ("rockerBOO/lora-inspector#6",),
        ("follows-schedule", "weak-evidence"),
        "no number on weights alone does (docs/validity.md)",
    ),
    Failure(
        "NaN found at generation time only",
        ("bmaltais/kohya_ss#1916", "kohya-ss/sd-scripts#1091", "huggingface/diffusers!5316"),
        ("nonfinite", "base-nonfinite"),
    ),
    Failure(
        "B stayed zero, the adapter does nothing",
        ("huggingface/peft#1402", "huggingface/peft#2500", "huggingface/trl#4416"),
        ("zero-change", "dead-modules", "checkpoint-undefined"),
    ),
    Failure(
        "443 or 888 bytes (ZeRO-3)",
        ("huggingface/transformers#24551", "artidoro/qlora!44"),
        ("empty-tensors",),
    ),
    Failure("every checkpoint is identical", ("huggingface/peft#353",), ("unchanged", "duplicate")),
    Failure(
        "a float16 save turned weights to 0",
        ("kohya-ss/sd-scripts#93", "kohya-ss/sd-webui-additional-networks#49"),
        ("flushed-to-zero", "zero-change"),
    ),
    Failure(
        "keys do not match the base, no effect",
        ("Comfy-Org/ComfyUI#1144", "Comfy-Org/ComfyUI#6381", "Nerogar/OneTrainer#842"),
        ("base-mismatch", "module-unresolved", "base-hash-differs"),
        "a loader that spells names in another way than the base at hand is not seen",
    ),
    Failure("alpha is lost, the strength is wrong", ("Comfy-Org/ComfyUI!15830",), ("scale-unknown", "scale-changes")),
    Failure(
        "truncated or corrupt files",
        ("bmaltais/kohya_ss#1973", "Comfy-Org/ComfyUI#9085", "Comfy-Org/ComfyUI#15602"),
        ("truncated-file", "empty-file", "unreadable-file", "unfinished-save", "foreign-file", "unsafe-pickle"),
    ),
    Failure(
        "which step, rate, base was this file?",
        ("cocktailpeanut/fluxgym#214", "tdrussell/diffusion-pipe#318"),
        ("step-unknown", "epochs-only", "learning-rate-unknown", "no-base-model"),
        "`inspect` tells what the file holds",
    ),
    Failure(
        "the trainer deleted the save that I wanted",
        ("ostris/ai-toolkit#570", "huggingface/transformers!41899", "kohya-ss/sd-scripts#650"),
        ("keep-limit", "pruned", "missing-steps"),
    ),
    Failure(
        "a folder was reused, a final file overwritten",
        (),
        ("final-overwritten", "out-of-order", "several-trainings", "same-step", "mixed-runs"),
    ),
    Failure(
        "which modules do nothing; what differs between two files",
        ("mrbizarro/Phosphene#62", "rockerBOO/lora-inspector#11"),
        ("dead-modules",),
        "`inspect A B` tells the difference",
    ),
    Failure(
        "spikes in the spectrum break stacking",
        ("ostris/ai-toolkit#964",),
        ("outlier-modules", "larger-than-weight", "intruder-dimensions"),
    ),
    Failure(
        "average the late checkpoints",
        ("kohya-ss/musubi-tuner!347", "bghira/SimpleTuner!1176"),
        (),
        "`average` does; that is no fault to be found",
    ),
    Failure(
        "Prodigy's rate makes logs useless",
        ("tdrussell/diffusion-pipe#201", "konstmish/prodigy#12"),
        ("learning-rate-unknown",),
    ),
)
"""In the order of the list that they were collected in."""
