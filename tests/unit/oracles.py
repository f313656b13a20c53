"""Slow, obvious, float64 versions of the formulas; nothing here comes from seg_core."""

from __future__ import annotations

import math

import torch

# Largest deviation allowed per dtype, relative to values of order one.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}


def assert_near(actual, expected, dtype=None):
    """Compare in float64 with the tolerance of the actual tensor's dtype."""
    bound = TOLERANCE[dtype or actual.dtype]
    expected = expected.to(torch.float64)
    torch.testing.assert_close(actual.to(torch.float64), expected, rtol=bound, atol=bound)


def mirrored(cell, size, mirror):
    """Walk to a cell beyond the border and back; the mirrors stand at `mirror` from both ends."""
    while not 0 <= cell < size:
        cell = 2 * mirror - cell if cell < 0 else 2 * (size - 1 - mirror) - cell
    return int(cell)


def blur_matrix(size, sigma, kernel, taps=None):
    """Scatter one Gaussian tap after the other; the mirror is the border cell or its edge."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    if math.isinf(sigma) and taps is None:
        return torch.full_like(matrix, 1 / size)
    if kernel == "reference":
        taps = taps or math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        reach, mirror = min(taps, size - (size % 2 - 1)) // 2, 0.0
    else:
        reach, mirror = math.ceil(9 * sigma) + 1, -0.5
    weights = {x: math.exp(-0.5 * (x / sigma) ** 2) for x in range(-reach, reach + 1)}
    total = math.fsum(weights.values())
    for row in range(size):
        for offset, weight in weights.items():
            matrix[row, mirrored(row + offset, size, mirror)] += weight / total
    return matrix


def dense_blur(grid, sigma, kernel, axes="space"):
    """The blur of all tokens as one matrix; `grid` is (frames, height, width)."""
    widths = [sigma if name in axes else 0.0 for name in ("time", "space", "space")]
    times, rows, columns = (
        blur_matrix(size, width, kernel) for size, width in zip(grid, widths, strict=True)
    )
    return torch.kron(times, torch.kron(rows, columns))


def blurred(query, grid, sigma, kernel, axes="space"):
    """Queries blurred by the dense matrix."""
    return torch.einsum("ij,bjd->bid", dense_blur(grid, sigma, kernel, axes), query.double())


def attention_map(query, key):
    """Softmax of scaled dot products, by scalar loops, for one head."""
    rows = []
    for i in range(query.shape[0]):
        dots = [float(query[i].double() @ k.double()) / math.sqrt(len(k)) for k in key]
        exps = [math.exp(d - max(dots)) for d in dots]
        rows.append([e / math.fsum(exps) for e in exps])
    return torch.tensor(rows, dtype=torch.float64)


def multi_head(query, key, value, heads):
    """Multi-head attention, head by head and sample by sample."""
    samples = []
    for q, k, v in zip(query, key, value, strict=True):
        slices = zip(*(t.double().chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
        samples.append(torch.cat([attention_map(a, b) @ c for a, b, c in slices], dim=-1))
    return torch.stack(samples)


def energy(logits):
    """Minus the sum of the log-sum-exp of the rows of one map."""
    return -math.fsum(math.log(math.fsum(math.exp(float(a)) for a in row)) for row in logits)


def hessian(logits, grid, sigma, kernel):
    """Hessian of the smoothed energy in the unblurred logits of one map, by autograd."""
    dense = dense_blur(grid, sigma, kernel)

    def smoothed_energy(flat):
        return -torch.logsumexp(dense @ flat.reshape(logits.shape), dim=-1).sum()

    return torch.autograd.functional.hessian(smoothed_energy, logits.flatten())


def spread(values):
    """Population standard deviation of all numbers of a tensor."""
    numbers = [float(v) for v in values.double().flatten()]
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in numbers) / len(numbers))


def rescaled(denoised, prediction, cond, perturbed, scale, amount, mode):
    """Guidance with the spread pulled back to that of cond, sample by sample."""
    samples = (tensor.double() for tensor in (denoised, prediction, cond, perturbed))
    results = []
    for d, p, c, q in zip(*samples, strict=True):
        push = scale * (p - q)
        result = (d if mode == "full" else c) + push
        results.append(d + push * (1 - amount + amount * spread(c) / spread(result)))
    return torch.stack(results)


def saliency(plane):
    """Softmax over the cells of the blurred magnitude of one (height, width) plane."""
    vertical, horizontal = (blur_matrix(n, 1.0, "reference", taps=3) for n in plane.shape)
    scores = vertical @ plane.double().abs() @ horizontal.T
    exps = scores.exp()
    return exps / exps.sum()


def fused(first, second):
    """Cell by cell the more salient of two stacks of planes."""
    result = first.double().clone()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in first.shape[:-2])).tolist():
        at = tuple(index)
        better = saliency(second[at]) > saliency(first[at])
        result[at] = torch.where(better, second[at].double(), first[at].double())
    return result
