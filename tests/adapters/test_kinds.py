"""Every kind of adapter: the contract, true deltas of the libraries, and each algebraic form against dense matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from factories import library, peft_run
from hypothesis import given, settings
from hypothesis import strategies as st
from references import LOOKS_BACK, METRIC, dense
from safetensors.torch import load_file, save_file

import lora_forensics as lf
from lora_forensics.adapters import KINDS, Settings, Stack, read_layout, read_settings
from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import Layout
from lora_forensics.errors import CheckpointError
from lora_forensics.measure import MeasureOptions
from lora_forensics.metrics import METRICS
from lora_forensics.moments import (
    Change,
    DenseHadamardChange,
    GivenChange,
    HadamardChange,
    KroneckerChange,
    LowRankChange,
    Moments,
    ScaledChange,
    StackedLowRankChange,
    Weight,
    decomposed,
    full_precision,
)
from lora_forensics.moments.spectra import largest_singular_values
from lora_forensics.records import Unresolved
from lora_forensics.tensors import TensorInfo, open_tensors

CPU = torch.device("cpu")
DATA = Path(__file__).parent.parent / "data" / "adapters"
CASES = json.loads((DATA / "cases.json").read_text("utf-8"))
"""Small modules of adapters as the libraries wrote them; their true deltas are merged weight less base weight."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_follows_its_interface(kind: str) -> None:
    """Contract over the table: documented, roles among the groups of its pattern, nothing recognised in nothing."""
    variant = KINDS[kind]
    assert variant.name == kind
    assert all((variant.about.title, variant.about.formula, variant.about.source))
    roles = set(variant.keys.groupindex)
    assert "module" in roles
    assert set(variant.suffixes) | variant.scalars | variant.aside <= roles
    assert variant.layout({}, AdapterConfig(), "m") is None
    assert all(variant.layout({role: ()}, AdapterConfig(), "m") is None for role in variant.suffixes if role != "rows")


@pytest.mark.parametrize("case", CASES)
def test_any_shapes_are_a_layout_or_none(case: str) -> None:
    """Scalars, empty tensors and axes too many or too few among the tensors that a library wrote."""
    tensors = load_file(DATA / "cases.safetensors")
    prefix = f"{case}|adapter|"
    infos = {
        name.removeprefix(prefix): TensorInfo("F32", tuple(t.shape))
        for name, t in tensors.items()
        if name.startswith(prefix)
    }
    config = AdapterConfig(values=CASES[case]["config"] or {})
    odd = ((), (0,), (1,), (3,), (0, 4), (4, 0), (4, 4), (1, 1, 1), (2, 2, 2, 2, 2))
    for module in read_layout(infos, Settings({"": config})).modules.values():
        shapes = {role: infos[key].shape for role, key in module.keys.items()}
        for role, shape in product(shapes, odd):
            found = KINDS[module.kind].layout({**shapes, role: shape}, config, module.name)
            assert found is None or isinstance(found, Layout | Unresolved)


@pytest.mark.parametrize("case", CASES)
def test_the_change_is_that_of_the_library(case: str, tmp_path: Path) -> None:
    """Norm, inner products and largest singular value of every module, from its tensors, configuration and weight."""
    tensors = load_file(DATA / "cases.safetensors")
    prefix = f"{case}|adapter|"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    save_file(own, tmp_path / "adapter_model.safetensors", CASES[case]["metadata"])
    config = None
    if CASES[case]["config"]:
        config = tmp_path / "adapter_config.json"
        config.write_text(json.dumps(CASES[case]["config"]), "utf-8")
    file = open_tensors(tmp_path / "adapter_model.safetensors")
    known = read_settings(config, file.metadata)
    found = read_layout(file.infos, known)
    assert set(found.modules) == set(CASES[case]["modules"])
    for name, told in CASES[case]["modules"].items():
        weight, delta = (
            _oriented(tensors[f"{case}|{what}|{name}"], told["transposed"]) for what in ("weight", "delta")
        )
        module = found.modules[name]
        kind = KINDS[module.kind]
        assert module.layout.rows in (None, len(weight))
        assert module.layout.columns in (None, weight.shape[1])
        held = {role: file.read(key) for role, key in module.keys.items()}
        values = {role: tensor.item() for role, tensor in held.items() if role in kind.scalars}
        scale = kind.scale(values, known.of(name), name, module.layout.rank)
        assert scale is not None
        stack = Stack(
            module=name,
            layout=module.layout,
            tensors={role: t[None] for role, t in held.items() if role not in kind.scalars | kind.aside},
            scale=torch.tensor([scale], dtype=torch.float64),
            lead=0,
            config=known.of(name),
        )
        moments = moments_of(kind.change(stack), weight.float())
        size = delta.norm()
        assert abs(moments.norm2.sqrt()[0] / size - 1) < 1e-6
        assert ((moments.dot[0] - (weight * delta).sum(dim=1)) / (size * weight.norm())).abs().max() < 1e-6
        assert ((moments.d2[0] - delta.square().sum(dim=1)) / size**2).abs().max() < 1e-6
        assert abs(moments.singular[0, 0] / torch.linalg.matrix_norm(delta, 2) - 1) < 1e-5


def _oriented(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    flat = tensor.reshape(len(tensor), -1).double()
    return flat.T if transposed else flat


def moments_of(
    change: Change, weight: torch.Tensor | None, spectra: bool = False, device: torch.device = CPU
) -> Moments:
    """Of a weight that is read by rows."""
    frozen = None if weight is None else Weight(*weight.shape, lambda a, b: weight[a:b])
    with full_precision():
        return change.moments(frozen, device, spectra)


Form = Callable[[torch.Generator, torch.Tensor, int, int], tuple[Change, torch.Tensor]]
"""Generator, W, checkpoints and lead to a change and its dense deltas (checkpoints, rows, columns)."""


def wander(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Tensors that move a little from checkpoint to checkpoint."""
    start = torch.randn(1, *shape[1:], generator=generator)
    return start + 0.2 * torch.randn(*shape, generator=generator).cumsum(dim=0)


def _pair(generator: torch.Generator, weight: torch.Tensor, count: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    return wander(generator, count, rank, columns), 0.1 * wander(generator, count, rows, rank)


def _scale(count: int) -> torch.Tensor:
    return torch.full((count,), 0.5, dtype=torch.float64)


def low_rank(
    generator: torch.Generator, weight: torch.Tensor, count: int, lead: int
) -> tuple[LowRankChange, torch.Tensor]:
    """B A."""
    down, up = _pair(generator, weight, count, 2)
    return LowRankChange(down, up, _scale(count), lead), 0.5 * up.double() @ down.double()


def hadamard(kind: type[HadamardChange | DenseHadamardChange]) -> Form:
    """(B1 A1) * (B2 A2)."""

    def form(generator: torch.Generator, weight: torch.Tensor, count: int, lead: int) -> tuple[Change, torch.Tensor]:
        first, second = (_pair(generator, weight, count, rank) for rank in (2, 3))
        change = kind(first, second, _scale(count), lead, (*first, *second))
        return change, 0.5 * (first[1].double() @ first[0].double()) * (second[1].double() @ second[0].double())

    return form


def kronecker(
    generator: torch.Generator, weight: torch.Tensor, count: int, lead: int
) -> tuple[KroneckerChange, torch.Tensor]:
    """P kron B A."""
    (a, b), (c, d) = (_split(size) for size in weight.shape)
    left = wander(generator, count, a, c)
    down, up = wander(generator, count, 2, d), 0.1 * wander(generator, count, b, 2)
    change = KroneckerChange(left, (up, down), _scale(count), lead, (left, up, down))
    right = up.double() @ down.double()
    return change, 0.5 * torch.stack([torch.kron(p, q) for p, q in zip(left.double(), right, strict=True)])


def _split(size: int) -> tuple[int, int]:
    small = max(n for n in range(1, size + 1) if size % n == 0 and n * n <= size)
    return small, size // small


def scaled(by_column: bool) -> Form:
    """(g - 1) W."""

    def form(generator: torch.Generator, weight: torch.Tensor, count: int, lead: int) -> tuple[Change, torch.Tensor]:
        parts = weight.shape[1 if by_column else 0]
        values = 1 + 0.1 * wander(generator, count, parts)
        factor = values.double().unsqueeze(1 if by_column else 2)
        return ScaledChange(values, by_column, False, lead), (factor - 1) * weight.double()

    return form


def dora(inner: Form, by_column: bool, group: int = 1) -> Form:
    """G (W + D) - W with magnitudes of rows, columns, or groups of columns."""

    def form(generator: torch.Generator, weight: torch.Tensor, count: int, lead: int) -> tuple[Change, torch.Tensor]:
        change, delta = inner(generator, weight, count, lead)
        moved = weight.double() + delta
        axis = 1 if by_column else 2
        squares = moved.square().sum(dim=axis)
        size = group if by_column and squares.shape[1] % group == 0 else 1
        norms = squares.unflatten(1, (-1, size)).sum(dim=-1).sqrt()
        values = (norms * (1 + 0.1 * torch.randn(norms.shape, generator=generator))).float()
        factor = (values.double() / norms).repeat_interleave(size, dim=1).unsqueeze(axis)
        return decomposed(values, by_column, change, lead), factor * moved - weight.double()

    return form


def given_weight(
    generator: torch.Generator, weight: torch.Tensor, count: int, lead: int
) -> tuple[Change, torch.Tensor]:
    """Saved less W."""
    saved = weight + 0.1 * wander(generator, count, *weight.shape)
    return GivenChange(saved, lead, less_weight=True), saved.double() - weight.double()


def experts(generator: torch.Generator, weight: torch.Tensor, count: int, lead: int) -> tuple[Change, torch.Tensor]:
    """Pairs on top of each other."""
    number, rows = _split(len(weight))
    down = wander(generator, count, number, 2, weight.shape[1])
    up = 0.1 * wander(generator, count, number, rows, 2)
    change = StackedLowRankChange(down, up, _scale(count), lead)
    return change, 0.5 * (up.double() @ down.double()).flatten(1, 2)


FORMS: dict[str, Form] = {
    "low rank": low_rank,
    "hadamard": hadamard(HadamardChange),
    "hadamard, dense": hadamard(DenseHadamardChange),
    "kronecker": kronecker,
    "rows scaled": scaled(False),
    "columns scaled": scaled(True),
    "dora": dora(low_rank, False),
    "dora by input": dora(low_rank, True),
    "dora by input of a convolution": dora(low_rank, True, group=2),
    "doha": dora(hadamard(HadamardChange), False),
    "doha by input": dora(hadamard(HadamardChange), True),
    "dense doha": dora(hadamard(DenseHadamardChange), False),
    "dokr": dora(kronecker, False),
    "dokr by input": dora(kronecker, True),
    "saved": given_weight,
    "experts": experts,
}
LOOSE = {"direction_change": 1e-5, "rotation": 1e-5, "stable_rank": 1e-5, "effective_rank": 1e-5, "spectral_norm": 2e-6}


def build(
    form: str, seed: int, rows: int, columns: int, count: int, lead: int
) -> tuple[torch.Tensor, Change, torch.Tensor]:
    """W, a change and its dense deltas."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    change, deltas = FORMS[form](generator, weight, count, lead)
    return weight, change, deltas


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 24), columns=st.integers(3, 24), count=st.integers(1, 4), seed=st.integers(0, 1000),
    lead=st.integers(0, 1),
)  # fmt: skip
def test_every_metric_equals_its_dense_definition(
    form: str, rows: int, columns: int, count: int, seed: int, lead: int
) -> None:
    """Whatever the shape and the number of checkpoints, with all singular values asked for."""
    if "do" in form:  # in a row or column of few entries terms may cancel, and no digits are left: see `columns` too
        rows, columns = max(rows, 5), max(columns, 5)
    weight, change, deltas = build(form, seed, rows, columns, count + lead, lead)
    moments = moments_of(change, weight, spectra=True)
    for index in range(count):
        before = deltas[index + lead - 1] if index + lead else None
        for name, expected in dense(weight.double(), deltas[index + lead], before).items():
            found = METRIC[name](moments)[index].item()
            assert found == pytest.approx(expected, rel=LOOSE.get(name, 1e-6), abs=1e-7), (name, index)


@pytest.mark.parametrize("form", FORMS)
def test_without_spectra_only_what_has_a_core_has_an_effective_rank(form: str) -> None:
    """The largest singular value by Lanczos steps is that of the decomposition; no metric but one goes missing."""
    weight, change, deltas = build(form, 3, 40, 30, 3, 1)
    moments = moments_of(change, weight)
    for index in range(2):
        expected = torch.linalg.matrix_norm(deltas[index + 1], 2).item()
        assert METRIC["spectral_norm"](moments)[index].item() == pytest.approx(expected, rel=1e-6)
    missing = {metric.column.name for metric in METRICS if not metric.needs <= moments.known}
    turns = {"down_rotation", "up_rotation", "down_moved"}
    scales = {"scale_mean", "scale_spread", "scale_carried", "changed_share"}
    assert missing <= {"effective_rank", "down_norm", "up_norm", "cosine_noise", *turns, *scales}
    if "spectrum" in moments.known:
        assert METRIC["effective_rank"](moments)[0].item() == pytest.approx(
            dense(weight.double(), deltas[1], None)["effective_rank"], rel=1e-5
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [0, 1])
def test_a_change_is_also_had_as_a_matrix(form: str, lead: int) -> None:
    """For the analyses that need one: leading checkpoints are counted."""
    weight, change, deltas = build(form, 6, 12, 8, 3, lead)
    for index, expected in enumerate(deltas):
        torch.testing.assert_close(change.delta(index, weight.double(), CPU), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_needs_the_weight_is_unknown_without_it(form: str) -> None:
    """Null, never wrong: a change that rests on W has no norm; any other has the same norm as with it."""
    weight, change, deltas = build(form, 4, 12, 8, 3, 0)
    moments = moments_of(change, None)
    assert "weight" not in moments.known
    if "change" not in moments.known:
        assert form not in ("low rank", "hadamard", "hadamard, dense", "kronecker", "experts")
        assert moments.nonfinite.tolist() == [0, 0, 0]
    else:
        norms = deltas.flatten(1).norm(dim=1)
        torch.testing.assert_close(METRIC["delta_norm"](moments), norms, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            METRIC["rotation"](moments)[1:], METRIC["rotation"](moments_of(change, weight))[1:], rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [0, 1])
def test_a_leading_predecessor_changes_nothing_but_where_rows_start(form: str, lead: int) -> None:
    """The same numbers in one chunk or in two."""
    weight, change, _ = build(form, 5, 10, 12, 4, 0)
    _, later, _ = build(form, 5, 10, 12, 4, lead)
    whole, rest = moments_of(change, weight), moments_of(later, weight)
    for name in METRIC:
        torch.testing.assert_close(
            METRIC[name](rest), METRIC[name](whole)[lead:], rtol=1e-9, atol=1e-12, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(30, 20), (600, 500)])
def test_every_device_gives_the_same_numbers(form: str, size: tuple[int, int], device: torch.device) -> None:
    """On both sides of the switch from float64 products to float32 ones."""
    weight, change, deltas = build(form, 6, *size, 3, 0)
    moments = moments_of(change, weight, device=device)
    for index in range(3):
        for name, expected in dense(weight.double(), deltas[index], None).items():
            if name != "effective_rank":
                rough = name in ("spectral_norm", "stable_rank")  # Lanczos steps stop early for large matrices
                bound = 0.25 if rough else 2e-5
                assert METRIC[name](moments)[index].item() == pytest.approx(expected, rel=bound, abs=1e-7), name


PAIR = {"down": (2, 12), "up": (10, 2)}
LAYOUT = Layout(2, 10, 12)
TENSORS: dict[str, dict[str, tuple[int, ...]]] = {
    "lora": PAIR,
    "dora": {**PAIR, "magnitude": (10,)},
    "loha": {"w1_a": (10, 2), "w1_b": (2, 12), "w2_a": (10, 2), "w2_b": (2, 12)},
    "lokr": {"w1": (2, 3), "w2": (5, 4)},
    "lokr-dora": {"w1": (2, 3), "w2": (5, 4), "dora_scale": (10, 1)},
    "ia3": {"factor": (10, 1)},
    "glora": {"a1": (12, 2), "a2": (2, 12), "b1": (10, 2), "b2": (2, 12)},
    "tlora": {"down": (2, 12), "up": (10, 2), "values": (1, 2)},
    "hra": {"directions": (12, 2)},
    "miss": {"block": (4, 10)},
    "oft": {"triangle": (3, 6)},
    "boft": {"blocks": (1, 3, 4, 4), "factor": (10, 1)},
    "diag-oft": {"blocks": (5, 2, 2)},
    "hira": PAIR,
    "vera": {"outer": (10,), "inner": (2,), "down": (2, 16), "up": (16, 2)},
    "full": {"diff": (10, 12)},
    "weights": {"weight": (10, 12)},
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_nonfinite_entries_stay_in_their_checkpoint(kind: str, poison: float, dtype: torch.dtype) -> None:
    """Counted, and neighbours keep their numbers, in every storage type."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 12, generator=generator)
    clean = {role: wander(generator, 3, *shape).to(dtype) for role, shape in TENSORS[kind].items()}
    broken = {role: tensor.clone() for role, tensor in clean.items()}
    first = next(iter(broken))
    wide = broken[first].float()
    wide.view(3, -1)[1, 0] = poison if dtype.itemsize > 1 else math.nan  # this type has no Inf
    broken[first] = wide.to(dtype)
    stack = Stack("m", LAYOUT, clean, _scale(3), 0, AdapterConfig())
    expected = moments_of(KINDS[kind].change(stack), weight)
    found = moments_of(KINDS[kind].change(replace(stack, tensors=broken)), weight)
    assert found.nonfinite.tolist() == [0, 1, 0]
    for metric in METRICS:
        if metric.column.name in ("nonfinite", "base_norm") or not metric.needs <= found.known:
            continue
        values, before = metric.compute(found), metric.compute(expected)
        assert values[1].isnan(), metric.column.name
        torch.testing.assert_close(values[0], before[0], rtol=1e-9, atol=0, equal_nan=True)
        if metric.column.name not in LOOKS_BACK:
            torch.testing.assert_close(values[2], before[2], rtol=1e-9, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dora", "dora-in", "loha", "lokr", "lokr, low rank", "rows", "columns"])
def test_the_predicted_storage_noise_is_what_rounding_does(kind: str, dtype: torch.dtype) -> None:
    """Over 80 unrelated adapters, the rounding error of the cosine has the predicted deviation within a quarter."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, rank, count = 96, 64, 3, 80
    weight = torch.randn(rows, columns, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    pair = [normal(rank, columns), 0.1 * normal(rows, rank)]
    moved = (weight + pair[1] @ pair[0]).double()
    tensors = {
        "dora": [*pair, (moved.norm(dim=2) * (1 + 0.02 * normal(rows))).float()],
        "dora-in": [*pair, (moved.norm(dim=1) * (1 + 0.02 * normal(columns))).float()],
        "loha": [*pair, normal(rank, columns), normal(rows, rank)],
        "lokr": [normal(8, 8), normal(12, 8)],
        "lokr, low rank": [normal(8, 8), normal(12, 4), normal(4, 8)],
        "rows": [1 + 0.05 * normal(rows)],
        "columns": [1 + 0.05 * normal(columns)],
    }[kind]

    def cosines(stored: Sequence[torch.Tensor]) -> Moments:
        one = torch.ones(count, dtype=torch.float64)
        if kind.startswith("dora"):
            change: Change = decomposed(stored[2], kind == "dora-in", LowRankChange(stored[0], stored[1], one), 0)
        elif kind == "loha":
            change = HadamardChange((stored[0], stored[1]), (stored[2], stored[3]), one, 0, tuple(stored))
        elif kind.startswith("lokr"):
            right = stored[1] if kind == "lokr" else (stored[1], stored[2])
            change = KroneckerChange(stored[0], right, one, 0, tuple(stored))
        else:
            change = ScaledChange(stored[0], kind == "columns", False, 0)
        return moments_of(change, weight)

    exact = METRIC["cosine"](cosines(tensors))
    rounded = cosines([tensor.to(dtype) for tensor in tensors])
    error = (METRIC["cosine"](rounded) - exact).square().mean().sqrt().item()
    assert METRIC["cosine_noise"](rounded).square().mean().sqrt().item() == pytest.approx(error, rel=0.25)


@pytest.mark.parametrize("shape", [(200, 120), (60, 300), (1, 7), (2, 2)])
def test_the_largest_singular_values_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    """Within 1e-6, for matrices whose spectra have no gap, and for zero."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrices[2] = 0

    def multiply(vectors: torch.Tensor, transposed: bool) -> torch.Tensor:
        return ((matrices.mT if transposed else matrices) @ vectors[:, :, None])[:, :, 0]

    found = largest_singular_values(multiply, 3, *shape, CPU)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(matrices, 2), rtol=1e-6, atol=1e-12)


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    """A header; '__' stands for a dot."""
    return {name.replace("__", "."): TensorInfo("F32", shape) for name, shape in shapes.items()}


def test_one_file_holds_many_kinds() -> None:
    """LoKr falls back to whole sides, norms and biases stand beside: each module by itself."""
    found = read_layout(
        infos(
            a__lokr_w1=(2, 2), a__lokr_w2=(4, 4), a__alpha=(),
            b__lokr_w1=(2, 2), b__lokr_w2_a=(4, 1), b__lokr_w2_b=(1, 4), b__dora_scale=(8, 1),
            c__w_norm=(8,), c__b_norm=(8,),
            d__diff=(8, 8), d__diff_b=(8,),
            e__lora_down__weight=(2, 8), e__lora_up__weight=(8, 2), e__alpha=(),
            f__weight=(8,), f__on_input=(),
        )
    )  # fmt: skip
    kinds = {name: module.kind for name, module in found.modules.items()}
    assert kinds == {"a": "lokr", "b": "lokr-dora", "c": "full", "d": "full", "e": "lora", "f": "ia3"}


def test_a_trained_bias_beside_an_adapter_is_no_part_of_it() -> None:
    """Peft's bias='all': the pair is measured, the bias is listed."""
    found = read_layout(infos(m__lora_A__weight=(2, 8), m__lora_B__weight=(6, 2), m__bias=(6,)))
    assert list(found.modules) == ["m"]
    assert found.foreign == ("m.bias",)


@pytest.mark.parametrize("kind", ["vera", "ia3", "oft", "boft", "hra", "diag-oft", "weights", "shira"])
def test_tensors_that_do_not_fit_the_weight_are_an_error_with_the_reason(kind: str) -> None:
    """Never a traceback of torch."""
    shapes = {**TENSORS, "shira": {"values": (3,), "places": (2, 3)}, "vera": {**TENSORS["vera"], "down": (2, 5)}}
    tensors = {role: torch.ones(1, *shape) * 50 for role, shape in shapes[kind].items()}
    stack = Stack("m", LAYOUT, tensors, _scale(1), 0, AdapterConfig())
    size = (10, 12) if kind == "vera" else (9, 7)
    with pytest.raises(CheckpointError):
        moments_of(KINDS[kind].change(stack), torch.randn(size))


def test_a_models_file_is_no_adapter() -> None:
    """Whole weights count only beside an adapter."""
    assert not read_layout(infos(m__weight=(6, 8), norm__weight=(8,))).modules


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig", "IA3Config", "HRAConfig", "OFTConfig"])
def test_a_run_of_the_library_is_measured(kind: str, tmp_path: Path) -> None:
    """From files to tables: cosine and norm of what peft merges, at every checkpoint."""
    peft = library("peft")
    extra = {
        "LoraConfig": {"use_dora": True, "r": 4, "target_modules": ["k_proj", "down_proj", "embed_tokens"]},
        "IA3Config": {"feedforward_modules": ["down_proj"]},
        "OFTConfig": {"r": 4, "oft_block_size": 0},
    }.get(kind, {"r": 4})
    run, deltas, weights = _merged_run(tmp_path, getattr(peft, kind), extra)
    layers = lf.measure_run(run, base=tmp_path / "base").layers
    assert len(layers) == sum(len(delta) for delta in deltas)
    for row in layers.iter_rows(named=True):
        weight, delta = weights[row["module"]], deltas[row["step"] // 10 - 1][row["module"]]
        assert row["delta_norm"] == pytest.approx(delta.norm().item(), rel=2e-5)
        cosine = (weight * delta).sum() / (weight.norm() * delta.norm())
        assert row["cosine"] == pytest.approx(cosine.item(), abs=2e-6)
        assert row["spectral_norm"] == pytest.approx(torch.linalg.matrix_norm(delta, 2).item(), rel=2e-5)
    whole = lf.measure_run(run, base=tmp_path / "base", options=MeasureOptions(spectra=True)).layers
    assert whole["effective_rank"].null_count() == 0
    without = lf.measure_run(run, base=None)
    assert without.layers["cosine"].null_count() == len(layers)


def _merged_run(
    folder: Path, config: type, extra: dict[str, object]
) -> tuple[lf.Run, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Three checkpoints that peft saved, and what it merges into each weight."""
    import copy
    import warnings

    from factories import tiny_llama, trainer_state

    peft = library("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = tiny_llama()
        plain.save_pretrained(folder / "base")
        before = {name: parameter.detach().double().clone() for name, parameter in plain.named_parameters()}
        model = peft.get_peft_model(plain, config(**{"target_modules": ["k_proj", "down_proj"], **extra}))
        generator = torch.Generator().manual_seed(1)
        deltas = []
        for step in (10, 20, 30):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            model.save_pretrained(folder / "run" / f"checkpoint-{step}")
            trainer_state(folder / "run" / f"checkpoint-{step}", [step], None)
            merged = dict(copy.deepcopy(model).double().merge_and_unload().named_parameters())
            changed = {name: merged[name].detach() - weight for name, weight in before.items()}
            names = {name: f"base_model.model.{name.removesuffix('.weight')}" for name in before}
            deltas.append({names[name]: delta for name, delta in changed.items() if delta.abs().max() > 1e-9})
    weights = {names[name]: weight for name, weight in before.items()}
    (run,) = lf.discover_runs(folder / "run")
    assert isinstance(run, lf.Run)
    return run, deltas, weights


def test_peft_run_still_serves_the_plain_kind(tmp_path: Path) -> None:
    """Modules saved as a whole are measured beside the pairs, by what they became."""
    written = peft_run(tmp_path, modules_to_save=["lm_head"], steps=[10, 20])
    (run,) = lf.discover_runs(written.path)
    assert isinstance(run, lf.Run)
    layers = lf.measure_run(run, base=written.base).layers
    assert set(layers["adapter"]) == {"lora", "weights"}


def test_a_few_steps_are_enough_for_a_large_matrix_whose_values_decay() -> None:
    """Within 1e-3, as in trained weights; without decay a few percent low, and never above."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(700, 700, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    for decay, low in ((0.5, 1 - 1e-3), (0.0, 0.9)):
        values = (
            torch.linspace(1, 0, 700, dtype=torch.float64) if not decay else torch.arange(1.0, 701).double() ** -decay
        )
        matrix = left * values @ right

        def multiply(vectors: torch.Tensor, transposed: bool, matrix: torch.Tensor = matrix) -> torch.Tensor:
            return vectors @ (matrix if transposed else matrix.mT)

        found = largest_singular_values(multiply, 1, 700, 700, torch.device("cpu")).item()
        assert low <= found <= 1 + 1e-9
