"""Products and sums in the precision that the verdict needs.

The product with W is float32 (never TF32), or float64 where that costs nothing; everything behind it is float64,
because the verdict rests on second-order differences of numbers near 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from lora_forensics.errors import CheckpointError
from lora_forensics.moments.interface import SMALL_WEIGHT, Weight
from lora_forensics.stacking import staged

WORKING_BYTES = 16 << 20
"""Memory that the temporaries of one block may take: larger ones are given back to the system and faulted in again,
which costs more than the arithmetic on them."""
_LARGER_ON_CUDA = 16
"""Blocks need not stay in a cache there, and small ones cost launches."""
_ROUNDING = 0.23
"""Rounding moves a number by up to eps / 2 of its binade: over numbers of all sizes about 0.23 eps of it (rms)."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch off TF32 and bfloat16 shortcuts in float32 products, whatever the calling program has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def widened(tensor: Tensor) -> Tensor:
    """Numbers that torch hardly computes with (fp8; whole numbers) in a type that holds them."""
    if tensor.is_floating_point():
        return tensor.float() if tensor.element_size() == 1 else tensor
    return tensor.real.double()


def wide_device(device: torch.device) -> torch.device:
    """Where float64 is to be had: mps has none."""
    return torch.device("cpu") if device.type == "mps" else device


def rounding(tensor: Tensor) -> float:
    """Relative standard deviation of what storing numbers in this tensor's type does to them."""
    return _ROUNDING * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def operand(factors: Tensor, entries: int, device: torch.device) -> Tensor:
    """The factors in the type and on the device of the product with a weight of so many entries."""
    if device.type != "mps" and (entries <= SMALL_WEIGHT or factors.dtype == torch.float64):
        return factors.double()
    if factors.is_cuda and factors.element_size() == 2:
        return factors
    return factors.float().to(device)


@contextmanager
def fitting() -> Iterator[None]:
    """What torch says of shapes that do not fit each other is said of the checkpoint.

    Raises:
        CheckpointError: with torch's own words.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else "shapes differ"
        raise CheckpointError(f"its tensors do not fit the weight: {reason}") from error


def derived_operand(factors: Tensor, entries: int, device: torch.device) -> Tensor:
    """The same for float64 factors that were computed: no more exact than float32 beside a large weight."""
    return operand(factors if entries <= SMALL_WEIGHT else factors.float(), entries, device)


def product(frozen: Tensor, factors: Tensor) -> Tensor:
    """W @ factors^T in the factors' type, sums in float32 or wider."""
    if frozen.dtype == factors.dtype and factors.element_size() == 2 and _sums_in_float32(factors.device):
        return torch.mm(frozen, factors.mT, out_dtype=torch.float32)
    if factors.element_size() == 2:
        factors = factors.float()
    return frozen.to(factors.device, factors.dtype) @ factors.mT


@lru_cache(maxsize=8)
def _sums_in_float32(device: torch.device) -> bool:
    """Whether 16-bit products with float32 sums (tensor cores) are to be had: newer torch, on CUDA."""
    if device.type != "cuda":
        return False
    tiny = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(tiny, tiny, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def weight_blocks(weight: Weight, bytes_each: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """Start, stop and rows of a weight, so many at a time that the temporaries of a row fit the working memory.

    The next ones are read while one is worked on.
    """
    spans = list(blocks(weight.rows, bytes_each // _LARGER_ON_CUDA if device.type == "cuda" else bytes_each))
    read = ((start, stop, weight.read(start, stop)) for start, stop in spans)
    for start, stop, stored in staged(read, device) if len(spans) > 1 else read:
        yield start, stop, widened(stored).to(device)


def times(weight: Weight, factors: Tensor, device: torch.device) -> Tensor:
    """W @ factors^T (rows, k) in float64, for factors (k, columns)."""
    wide = wide_device(device)
    out = torch.empty(weight.rows, len(factors), dtype=torch.float64, device=wide)
    ready = operand(factors, weight.rows * weight.columns, device)
    for start, stop, frozen in weight_blocks(weight, 8 * weight.columns + 16 * len(factors), wide):
        out[start:stop] = product(frozen, ready).to(wide).double()
    return out


def grams(factor: Tensor) -> tuple[Tensor, Tensor]:
    """X_t^T X_t (count, r, r) and X_t^T X_(t-1) (count - 1, r, r) in float64, for X (count, n, r), by blocks of n."""
    count, length, rank = factor.shape
    gram = torch.zeros(count, rank, rank, dtype=torch.float64, device=factor.device)
    cross = torch.zeros(max(count - 1, 0), rank, rank, dtype=torch.float64, device=factor.device)
    for first, last in blocks(count, 8 * length * rank):
        before = max(first - 1, 0)
        for start, stop in blocks(length, 8 * (last - before) * rank):
            block = factor[before:last, start:stop].double()
            own = block[first - before :]
            gram[first:last] += own.mT @ own
            cross[before : last - 1] += block[1:].mT @ block[:-1]
    return gram, cross


def core_singular_values(gram_up: Tensor, gram_down: Tensor) -> Tensor:
    """Singular values (count, rank) of B A, descending, from B^T B and A A^T.

    With B^T B = V diag(e) V^T they are the square roots of the eigenvalues of E A A^T E^T, E = diag(sqrt e) V^T.
    """
    with one_thread(gram_up.device):
        values, vectors = torch.linalg.eigh(gram_up)
        root = values.clamp(min=0).sqrt()[:, :, None] * vectors.mT
        squares: Tensor = torch.linalg.eigvalsh(root @ gram_down @ root.mT)
    return squares.clamp(min=0).sqrt().flip(-1)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Eigenvalues of small matrices on the CPU: threads that wait for each other cost far more than they share."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def blocks(length: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Stretches [start, stop) of a length whose parts take so many bytes each."""
    size = max(1, WORKING_BYTES // max(bytes_each, 1))
    for start in range(0, length, size):
        yield start, min(start + size, length)


def trace(gram: Tensor) -> Tensor:
    """Sum of the diagonal of (count, r, r)."""
    total: Tensor = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return total


def count_nonfinite(*tensors: Tensor) -> Tensor:
    """NaN and Inf entries (count,) in tensors (count, ...)."""
    return torch.stack([_nonfinite(widened(tensor)) for tensor in tensors]).sum(dim=0)


def _nonfinite(tensor: Tensor) -> Tensor:
    """The same of one: a finite sum has no NaN or Inf in it, and takes a third of the time of a look at each."""
    flat = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    total = flat.sum(dim=1, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    counts = torch.zeros(len(flat), dtype=torch.int64, device=tensor.device)
    for index in (~torch.isfinite(total)).nonzero().flatten().tolist():
        counts[index] = (~torch.isfinite(flat[index])).sum()
    return counts


def mask_nonfinite(tensor: Tensor) -> Tensor:
    """Zero at every checkpoint (first axis) that holds NaN or Inf."""
    return mask(tensor, count_nonfinite(tensor))


def mask(tensor: Tensor, nonfinite: Tensor) -> Tensor:
    """Zero where a checkpoint holds NaN or Inf, so that eigenvalue routines do not fail."""
    if not bool(nonfinite.any()):
        return tensor
    broken = (nonfinite > 0).to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
    return torch.where(broken, torch.zeros((), dtype=tensor.dtype, device=tensor.device), tensor)


def tucker_down(kernel: Tensor, down: Tensor) -> Tensor:
    """A (count, a, in * k) of a Tucker convolution: sum_b M[a, b, k] down[b, in], for M (count, a, b, ...)."""
    small = widened(down).double().flatten(2)
    mixed = small.mT[:, None] @ widened(kernel).double().flatten(3)  # (count, a, in, k)
    return mixed.flatten(2)


def singular_triples(weight: Weight, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and V^T of a weight, decomposed in float32 as trainers do whose start rests on it."""
    matrix = weight.matrix(wide_device(device)).float()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left.double(), values.double(), right.double()
