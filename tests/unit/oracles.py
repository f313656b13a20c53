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


def reference_taps(size, sigma):
    """Number of taps of the official kernel on an axis of `size` cells."""
    taps = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    return min(taps, size - (size % 2 - 1))


def bounce(cell, size):
    """Walk to a cell beyond the border and back, with the border cell as mirror."""
    while not 0 <= cell < size:
        cell = -cell if cell < 0 else 2 * (size - 1) - cell
    return cell


def fold(cell, size):
    """Walk to a cell beyond the border and back, with the border's outer edge as mirror."""
    while not 0 <= cell < size:
        cell = -cell - 1 if cell < 0 else 2 * size - 1 - cell
    return cell


def blur_matrix(size, sigma, kernel, taps=None):
    """Scatter one Gaussian tap after the other."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    if math.isinf(sigma):
        return torch.full_like(matrix, 1 / size)
    if kernel == "reference":
        reach, mirror = (taps or reference_taps(size, sigma)) // 2, bounce
    else:
        reach, mirror = math.ceil(9 * sigma) + 1, fold
    weights = {x: math.exp(-0.5 * (x / sigma) ** 2) for x in range(-reach, reach + 1)}
    total = math.fsum(weights.values())
    for row in range(size):
        for offset, weight in weights.items():
            matrix[row, mirror(row + offset, size)] += weight / total
    return matrix


def dense_blur(grid, sigma, kernel):
    """The blur of all tokens as one matrix; `grid` is (frames, height, width)."""
    frames, height, width = grid
    plane = torch.kron(blur_matrix(height, sigma, kernel), blur_matrix(width, sigma, kernel))
    return torch.kron(torch.eye(frames, dtype=torch.float64), plane)


def blurred(query, grid, sigma, kernel):
    """Queries blurred by the dense matrix."""
    return torch.einsum("ij,bjd->bid", dense_blur(grid, sigma, kernel), query.double())


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


def rescaled(denoised, prediction, perturbed, scale, amount, mode):
    """Guidance with the spread pulled back, sample by sample."""
    results = []
    for d, p, q in zip(denoised.double(), prediction.double(), perturbed.double(), strict=True):
        push = scale * (p - q)
        result = (d if mode == "full" else p) + push
        results.append(d + push * (1 - amount + amount * spread(p) / spread(result)))
    return torch.stack(results)


def saliency(plane):
    """Softmax over the cells of the blurred magnitude of one (height, width) plane."""
    height, width = plane.shape
    vertical, horizontal = (
        blur_matrix(n, 1.0, "reference", taps=min(3, n - (n % 2 - 1))) for n in (height, width)
    )
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
