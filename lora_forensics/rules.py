"""Rules: the stable ids of findings, one documented value each. A finding with another id does not exist.

`--fail-on`, `--select` and `--ignore` take these ids; docs/rules.md is made from the table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lora_forensics.errors import UsageError

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

PAGE = "docs/rules.md"
"""Where each rule has a heading of its own name."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what it is about, why that matters, and what to do."""

    about: str
    """What was seen, in one clause."""
    severity: Severity
    """Of its findings, unless `softer` names another that some of them have."""
    why: str
    """How it is seen, and what it means."""
    fix: str
    """What to do."""
    softer: tuple[Severity, ...] = ()
    """Other severities that its findings may have."""
    source: str = ""
    """Where the failure was reported, or the bound comes from."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Bounds that rules compare with: rules of thumb for finding damage, not measures of quality."""

    outlier_factor: float = field(
        default=10.0, metadata={"about": "`outlier-modules`: times the median change of its family"}
    )
    dead_factor: float = field(
        default=1000.0, metadata={"about": "`dead-modules`: times below the median change of its family"}
    )
    family: int = field(
        default=4, metadata={"about": "modules of one component, role and kind that are enough for a median"}
    )
    relative_norm: float = field(
        default=1.0, metadata={"about": "`larger-than-weight`: change over frozen weight, Frobenius norms"}
    )
    zero_share: float = field(
        default=0.05, metadata={"about": "`flushed-to-zero`: share of zeros among the numbers of a narrow type"}
    )
    few_checkpoints: int = field(
        default=30, metadata={"about": "`weak-evidence`: below so many checkpoints it says that picks were no better"}
    )
    rewritten_seconds: float = field(
        default=60.0, metadata={"about": "`out-of-order`: a later step must be so many seconds older"}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: a bound that is not above 0.
        """
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise UsageError(f"the threshold {name} is {getattr(self, name)}, not above 0", "leave it out")


_DEMAND = "https://github.com/"

RULES: dict[str, Rule] = {
    "empty-file": Rule(
        "a checkpoint of zero bytes",
        "error",
        "The file is there and holds nothing: the disk was full, or the save was killed before its first byte.",
        "Free space and save again; take a neighbouring checkpoint meanwhile.",
        source=f"{_DEMAND}bmaltais/kohya_ss/issues/1973",
    ),
    "truncated-file": Rule(
        "a checkpoint that ends before its data does",
        "error",
        "The header asks for more bytes than the file has, or the file ends inside its header: a full disk, a killed "
        "save, an aborted download.",
        "Copy or download it again, or take a neighbouring checkpoint.",
        source=f"{_DEMAND}Comfy-Org/ComfyUI/issues/9085",
    ),
    "unreadable-file": Rule(
        "a checkpoint that cannot be read",
        "error",
        "It is no tensor file at all (a web page or git-lfs pointer under its name, a broken adapter_config.json), or "
        "the system refuses to open it. The message says which.",
        "Download the file itself (`git lfs pull`), or restore it from another copy.",
        source=f"{_DEMAND}Comfy-Org/ComfyUI/issues/15602",
    ),
    "unfinished-save": Rule(
        "a checkpoint whose save was not finished",
        "error",
        "The trainer's own mark of an unfinished save is there, or its mark of a finished one is missing.",
        "Delete it, or resume from the checkpoint before it.",
    ),
    "foreign-file": Rule(
        "a file in a checkpoint's place that is no adapter",
        "error",
        "It is whole and readable, and none of its tensors is one that an adapter writes.",
        "Move it elsewhere; if it should be an adapter, the wrong model was saved.",
    ),
    "unplaced-adapter": Rule(
        "an adapter that belongs to no run",
        "warning",
        "It is an adapter, but its name and place fit no trainer's layout, or several runs could have written it.",
        "Keep the trainer's names and logs; `--trainer NAME` insists on one layout; `inspect FILE` looks at it alone.",
    ),
    "empty-tensors": Rule(
        "a checkpoint whose tensors hold no numbers",
        "error",
        "All shapes are [0]: under DeepSpeed ZeRO-3 every process holds a slice, and the save did not gather them. "
        "Such files have a few hundred bytes.",
        "Set stage3_gather_16bit_weights_on_model_save, or convert the state with zero_to_fp32.py.",
        source=f"{_DEMAND}huggingface/peft/issues/2892, {_DEMAND}huggingface/transformers/issues/24551",
    ),
    "unsafe-pickle": Rule(
        "a pickle that was refused, since it wants to run code",
        "error",
        "Pickles are opened with weights_only, which allows tensors and plain values. This one asks for more.",
        "Do not load it elsewhere either, unless you wrote it; save it as safetensors.",
    ),
    "nonfinite": Rule(
        "NaN or Inf in saved weights",
        "error",
        "Every stored number of every module is looked at. One of them spoils all that it is multiplied with: black "
        "or noisy images, or a single repeated token. Such a checkpoint is never named as the one to keep.",
        "Lower the learning rate, clip gradients, save in float32 or bfloat16; use an earlier checkpoint.",
        source=f"{_DEMAND}bmaltais/kohya_ss/issues/1916, {_DEMAND}kohya-ss/sd-scripts/issues/1091",
    ),
    "zero-change": Rule(
        "an adapter that changes nothing",
        "error",
        "Every change of a weight is exactly zero, mostly since all B are: the optimizer never got the adapter's "
        "parameters, the saved state was not the trained one, or a narrow type rounded it all to 0 (the message names "
        "it). At the first of several checkpoints it is only a note: before the first step an adapter is like that.",
        "Check that the adapter's parameters need gradients and are the ones saved; save in float32 or bfloat16.",
        ("info",),
        source=f"{_DEMAND}huggingface/peft/issues/1402, {_DEMAND}huggingface/peft/issues/2500, "
        f"{_DEMAND}huggingface/trl/issues/4416",
    ),
    "dead-modules": Rule(
        "modules that change nothing, or next to nothing, among others that change",
        "warning",
        "The change is 0, or a thousandth of the median of the modules of its component, role and kind "
        "(`dead_factor`). At the last whole checkpoint.",
        "They were frozen, or their gradient never arrived: look at the target modules, or leave them out.",
        source=f"{_DEMAND}mrbizarro/Phosphene/issues/62",
    ),
    "outlier-modules": Rule(
        "modules that change far more than others of their sort",
        "warning",
        "The change, relative to the weight where that is known, is ten times the median of the modules of its "
        "component, role and kind (`outlier_factor`). At the last whole checkpoint.",
        "They may dominate the result and break stacking with other adapters: lower the rate, or an earlier "
        "checkpoint.",
        source=f"{_DEMAND}ostris/ai-toolkit/issues/964",
    ),
    "larger-than-weight": Rule(
        "changes that are larger than the weight below them",
        "warning",
        "Frobenius norm of the change over that of the frozen weight is above 1 (`relative_norm`). At the last whole "
        "checkpoint. With the wrong base model this is common, too.",
        "Check the scale (alpha / rank) and the learning rate; check that the base model is the right one.",
    ),
    "flushed-to-zero": Rule(
        "numbers that a narrow type has rounded to zero",
        "warning",
        "More than a twentieth (`zero_share`) of the numbers stored as float16 or 8 bits are exactly 0; tensors of "
        "zeros alone are not counted, `zero-change` and `dead-modules` tell those.",
        "Save as bfloat16 or float32 (kohya: --save_precision).",
        source=f"{_DEMAND}kohya-ss/sd-scripts/issues/93, {_DEMAND}kohya-ss/sd-webui-additional-networks/issues/49",
    ),
    "checkpoint-undefined": Rule(
        "a checkpoint at which most modules have no cosine, left out of the series",
        "info",
        "More than half of the modules are zero or not finite there.",
        "Nothing, if it is the checkpoint of step 0; else see `nonfinite` and `zero-change`.",
        source="docs/method.md",
    ),
    "duplicate": Rule(
        "files with the same tensors, counted once",
        "info",
        "The final file is mostly a copy of the last numbered one. Compared by content.",
        "Nothing: one of the two may be deleted.",
    ),
    "same-step": Rule(
        "two different files of one step, of which one is left out",
        "warning",
        "Both say that they are of the same step, and their tensors differ.",
        "Two trainings may have written into one folder: give each its own.",
    ),
    "final-overwritten": Rule(
        "the final file is of another training than the numbered ones",
        "warning",
        "A rerun or a resumed training under the same name replaced the file without a number. Its session is not "
        "that of the numbered files beside it (kohya), its own step lies before theirs (ai-toolkit), or its A factors "
        "are drawn anew, which no training does between two saves: it is left out of the series then.",
        "Do not take the final file for the end of this run; give each training its own name.",
    ),
    "step-unknown": Rule(
        "a file whose training step cannot be known, left out",
        "warning",
        "Neither its name, its metadata nor a log beside it tells it.",
        "Keep what tells it: the trainer's state or log beside it, or the file's metadata.",
        source=f"{_DEMAND}cocktailpeanut/fluxgym/issues/214",
    ),
    "epochs-only": Rule(
        "no metadata: steps are unknown and epochs are counted instead",
        "warning",
        "The files' names count epochs, and nothing in them tells how many steps one has.",
        "Train with metadata (kohya: without --no_metadata), or read every step of the report as an epoch.",
    ),
    "missing-steps": Rule(
        "checkpoints are missing between others that were saved at one interval",
        "warning",
        "Most intervals are equal, and some are whole multiples: those in between were deleted, moved or never "
        "written. A single one may be the end of a session: its file had no number, and the resumed training "
        "overwrote it. CS is interpolated there.",
        "Restore them if they still exist: the answer may lie in the gap.",
    ),
    "keep-limit": Rule(
        "the first checkpoints of a run are gone, as a keep-limit deletes them",
        "warning",
        "The run starts at a step that is twice its interval or more. Trainers that keep the newest N saves delete "
        "the early ones, and the turning point is mostly among those. A training that was resumed into another folder "
        "looks the same: its first checkpoints lie in the old one.",
        "Raise or leave out the limit: save_total_limit (Trainer), --save_last_n_steps, --save_last_n_epochs (kohya), "
        "max_step_saves_to_keep (ai-toolkit), checkpoints_total_limit (diffusers). The finding names this trainer's.",
        source=f"{_DEMAND}ostris/ai-toolkit/issues/570, {_DEMAND}huggingface/transformers/pull/41899, "
        f"{_DEMAND}kohya-ss/sd-scripts/issues/650",
    ),
    "out-of-order": Rule(
        "later steps were written before earlier ones",
        "warning",
        "By the files' times, all from some step on are a minute or more older than those before it "
        "(`rewritten_seconds`): a second training has overwritten the first part of this one. Copies that lost their "
        "times have no such single break, and those made in the order of the names are passed over.",
        "Delete the older part, or give each training its own folder.",
    ),
    "resumed": Rule(
        "a training that was interrupted and resumed: several sessions, one run",
        "info",
        "The later session goes on where the one before ended.",
        "Nothing.",
    ),
    "superseded": Rule(
        "checkpoints saved after the step from which the training was resumed, left out",
        "info",
        "They are of a path that the training did not take in the end.",
        "Nothing.",
    ),
    "several-trainings": Rule(
        "checkpoints of several trainings in one folder, told apart",
        "warning",
        "Their logged histories contradict each other.",
        "They are runs of their own here; give each training its own output folder.",
    ),
    "pruned": Rule(
        "earlier checkpoints of the run were deleted, by its trainer or by `prune`",
        "warning",
        "The trainer's settings or the log of `prune` say so. What was measured of them before stays in the series.",
        "Early checkpoints matter most: raise the trainer's limit.",
        ("info",),
        source=f"{_DEMAND}ostris/ai-toolkit/issues/981",
    ),
    "log-unreadable": Rule(
        "a log beside the run that cannot be read, or not to its end",
        "info",
        "Rates and losses that stand in it are unknown.",
        "Install the extra `logs` for TensorBoard files; else restore the log.",
    ),
    "module-unresolved": Rule(
        "modules without a weight in the base model",
        "warning",
        "No tensor of the base has the name, or none has the shape: they have no cosine and no effect in a loader "
        "that looks names up as this does.",
        "Give the model that the run was trained on with --base; the hint says what is there instead.",
        source=f"{_DEMAND}Comfy-Org/ComfyUI/issues/6381",
    ),
    "module-unread": Rule(
        "modules of an adapter kind that is not read",
        "warning",
        "Their tensors belong to no kind in docs/formats.md.",
        "The rest of the run is measured; the hint says what was found.",
    ),
    "scale-unknown": Rule(
        "no file tells the scale; norms assume 1",
        "warning",
        "Neither an alpha tensor, the metadata nor adapter_config.json holds it, and the trainer has no habit. A "
        "loader guesses, and the strength is wrong.",
        "Keep adapter_config.json beside the weights.",
        source=f"{_DEMAND}Comfy-Org/ComfyUI/pull/15830",
    ),
    "svd-initialised": Rule(
        "an initialisation that changes the base weight, such as PiSSA",
        "warning",
        "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the adapter's start from the frozen weight: B @ A is not the "
        "change of the stock model, and without that step the adapter has no sensible effect on it. Where the start "
        "can be computed again (PiSSA, OLoRA) or was saved, it is subtracted and nothing is said.",
        "Keep the adapter as it was before the first step in a folder `init` beside the checkpoints, or convert it.",
        source="Meng et al., PiSSA, 2024",
    ),
    "no-base-model": Rule(
        "no base model was found",
        "warning",
        "The run does not say which, or what it says is not there. Cosines are unknown; norms, spectra and movement "
        "are not.",
        "Give it with --base PATH, or allow --download.",
    ),
    "base-mismatch": Rule(
        "a base model that does not fit the adapter at all",
        "error",
        "None of its modules has a weight of its name and shape there: another family, version or size of model.",
        "Give the model that the run was trained on with --base.",
        source=f"{_DEMAND}Comfy-Org/ComfyUI/issues/1144, {_DEMAND}Comfy-Org/ComfyUI/issues/7792",
    ),
    "base-missing": Rule(
        "the base model of an earlier scan is not found now; new checkpoints are not measured",
        "warning",
        "It was moved, deleted or lies on a disk that is away.",
        "Bring it back, or give it with --base.",
    ),
    "base-nonfinite": Rule(
        "NaN or Inf in the base model",
        "error",
        "Norms of frozen weights are not finite.",
        "Copy or download the base model again.",
    ),
    "base-hash-differs": Rule(
        "the base model is not the one that the run recorded",
        "warning",
        "The recorded hash or revision is another than that of the file at hand.",
        "Give the model that the run was trained on with --base; similarities to another one mean little.",
    ),
    "full-weights": Rule(
        "tensors saved beside the adapter, which are not compared",
        "info",
        "Biases, and parameters that are no weight.",
        "Nothing.",
    ),
    "learning-rate-unknown": Rule(
        "CS-Fluctuation is not divided by the learning rate",
        "info",
        "It is unknown at some checkpoint, as with optimizers that set their own. A constant rate moves no valley.",
        "Give --learning-rate, or keep the trainer's logs.",
        source=f"{_DEMAND}tdrussell/diffusion-pipe/issues/201",
    ),
    "held-out-elsewhere": Rule(
        "held-out loss was lowest at a step that was not saved",
        "warning",
        "Evaluations and saves do not fall on the same steps.",
        "Evaluate as often as the trainer saves.",
    ),
    "mixed-runs": Rule(
        "modules, shapes or ranks change inside a run",
        "warning",
        "Keys or sizes of one checkpoint are not those of the one before.",
        "Two trainings may have written into one folder: give each its own.",
    ),
    "scale-changes": Rule(
        "the scale (alpha / rank) changes inside a run",
        "warning",
        "The multiplier on B @ A of one module is another than at the checkpoint before, though its shapes are the "
        "same: the strength of these files differs by that alone.",
        "Two trainings may have written into one folder: give each its own; write alpha into every file.",
    ),
    "dtype-changes": Rule(
        "the type of the stored numbers changes inside a run",
        "warning",
        "Some files hold float16, say, and others float32: the precision changes, and small movements drown there.",
        "Save all checkpoints in one type, best float32 or bfloat16.",
    ),
    "unchanged": Rule(
        "checkpoints that equal the one before them",
        "error",
        "No module has moved by a single number: all tensors equal those of the checkpoint before, bit by bit.",
        "The adapter is not being trained, or one state is saved again and again.",
        source=f"{_DEMAND}huggingface/peft/issues/353",
    ),
    "reset": Rule(
        "an adapter that starts anew in the middle of a run, merged or redrawn; the series is cut there",
        "warning",
        "Changes fall to a small part of what they were, and A is redrawn.",
        "If the trainer does so on purpose (ReLoRA) nothing; else give each training its own folder.",
        source="Lialin et al., ReLoRA, 2023",
    ),
    "settled": Rule(
        "modules that had stopped moving long before the end",
        "info",
        "They move at a tenth of their fastest, or less, from there on.",
        "Training them further changes little.",
        source="after Wen et al., GradES, 2025",
    ),
    "intruder-dimensions": Rule(
        "leading directions of the changed weight that the frozen one does not have",
        "info",
        "Told where `--analysis intruders` was asked for.",
        "A lower rate, a higher rank or rsLoRA have fewer.",
        source=f"Shuttleworth et al., LoRA vs Full Fine-tuning, 2024; {_DEMAND}ostris/ai-toolkit/issues/964",
    ),
    "text-encoder-first": Rule(
        "the text encoder turns before the denoiser",
        "info",
        "The second valley of the text encoder's own cosines comes before that of the denoiser, by a window or more. "
        "It is weak evidence, as the denoiser's is: of two turning points by chance one is always first.",
        "Try a lower rate for the text encoder, or stop training it there.",
        source="docs/method.md",
    ),
    "without-base": Rule(
        "what is measured without a base model",
        "info",
        "Norms, spectra, rotation and path need none.",
        "Nothing; see `no-base-model`.",
    ),
    "uneven-cadence": Rule(
        "checkpoints at uneven intervals, interpolated",
        "warning",
        "The largest interval is more than 1.1 times the smallest.",
        "Save at one interval, and keep every checkpoint.",
    ),
    "follows-schedule": Rule(
        "a turning point that may only follow warm-up or decay of the learning rate",
        "warning",
        "It rests on checkpoints at which the rate rises from below 90 %, or has fallen below 10 %, of its peak.",
        "Compare the candidates on samples; probe.",
    ),
    "weak-evidence": Rule(
        "the answer rests on saved weights alone",
        "info",
        "Nothing held out was looked at, and a random walk has a second valley too.",
        "Probe: four held-out samples beat every rule on weights.",
        source="docs/validity.md",
    ),
    "too-few-checkpoints": Rule(
        "too few checkpoints for a second valley at all",
        "warning",
        "CS-Fluctuation has `T - 3M + 2` values, and two valleys need `T >= 3M + 3`: nine at least.",
        "Save more often: the hint names the setting of this trainer. Six checkpoints are enough for `probe`.",
    ),
    "few-checkpoints": Rule(
        "too few checkpoints for a second valley; which ones to compare",
        "info",
        "With 3 to 8 checkpoints the one at half of the way was no worse than the middle or the last, on average.",
        "Compare the candidates on samples that were not trained on.",
        source="docs/validity.md",
    ),
    "probe-flat": Rule(
        "checkpoints that the probe cannot tell apart, or that it gives no noise for",
        "info",
        "The 95 % interval of their difference holds 0, or there is one sample only.",
        "More samples tell more.",
        source="docs/probe.md",
    ),
    "probe-open": Rule(
        "a probe whose best checkpoint is the first or the last that it scored",
        "warning",
        "Better ones may lie beyond.",
        "Allow more evaluations.",
        source="docs/probe.md",
    ),
    "probe-stale": Rule(
        "checkpoints that were saved after the probe",
        "warning",
        "The probe has not seen them.",
        "Probe again: what was scored is not scored again.",
        source="docs/probe.md",
    ),
    "last-is-past": Rule(
        "training went on past the checkpoint to keep",
        "warning",
        "The last checkpoint is past the lowest held-out loss, the best in the probe, or the turning point; for the "
        "latter only a note where a random walk turns there too.",
        "Keep the one that is named, not the last; train for fewer steps the next time.",
        ("info",),
        source=f"{_DEMAND}ml-explore/mlx-lm/pull/331",
    ),
}
"""Id to the rule."""


def hint_of(rule: str) -> str:
    """What to do about it, as the hint of a finding that knows nothing better."""
    fix = RULES[rule].fix
    return f"{fix[0].lower()}{fix[1:].rstrip('.')}"


def anchor(rule: str) -> str:
    """Where a rule is documented: page and heading."""
    return f"{PAGE}#{rule}"


def matching(names: Iterable[str]) -> set[str]:
    """Rules and severities that these names stand for: ids, beginnings of ids (`base-*`, `base-`), severities.

    Raises:
        UsageError: a name stands for none; a pipeline that waits for it would never fail.
    """
    found: set[str] = set()
    for name in dict.fromkeys(names):
        exact = {name} & {*RULES, *SEVERITIES}
        wanted = exact or {rule for rule in RULES if name and rule.startswith(name.removesuffix("*"))}
        if not wanted:
            near = difflib.get_close_matches(name, [*RULES, *SEVERITIES], 1)
            hint = f"did you mean {near[0]}?" if near else "choose info, warning, error, or from `lora-forensics rules`"
            raise UsageError(f"no rule or severity is called {name!r}", hint)
        found |= wanted
    return found


def rule_of(name: str) -> Rule:
    """The rule of this id.

    Raises:
        UsageError: there is none.
    """
    if name not in RULES:
        near: Any = difflib.get_close_matches(name, RULES, 1)
        hint = f"did you mean {near[0]}?" if near else "`lora-forensics rules` lists them"
        raise UsageError(f"no rule is called {name!r}", hint)
    return RULES[name]
