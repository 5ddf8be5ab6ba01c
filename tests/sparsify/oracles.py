"""Slow oracles in plain Python and NumPy, written from the papers; the package is compared with them."""

from collections import defaultdict

import numpy as np


def sparsegpt(weight, gram, windows, *, density=0.5, nm=None, block=128, damping=0.01, bits=None):
    """Algorithm 1 of arXiv:2301.00774 with every later column updated at once; float64."""
    w, hessian = weight.astype(np.float64).copy(), 2 / windows * gram.astype(np.float64)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    top = 2 ** (bits - 1) - 1 if bits else 1
    scale = np.abs(w).max(1) / top
    kept = np.ones(w.shape, bool)
    for j in range(w.shape[1]):
        if nm is None and j % block == 0:
            columns = slice(j, j + block)
            score = w[:, columns] ** 2 / np.diag(upper)[columns] ** 2
            kept[:, columns] = score > np.sort(score.ravel())[int(score.size * (1 - density) + 1e-9)]
        if nm is not None and j % nm[1] == 0:
            columns = slice(j, j + nm[1])
            order = np.argsort(w[:, columns] ** 2 / np.diag(upper)[columns] ** 2, axis=1)
            np.put_along_axis(kept[:, columns], order[:, : nm[1] - nm[0]], False, axis=1)
        new = np.where(kept[:, j], w[:, j], 0)
        new = np.clip(np.round(new / scale), -top, top) * scale if bits else new
        w[:, j:] -= np.outer((w[:, j] - new) / upper[j, j], upper[j, j:])
        w[:, j] = new
    return w, kept


def wanda(weight, inputs, density):
    """Zero the lowest |w| ||x|| of each row, ties from the left; arXiv:2306.11695."""
    score = np.abs(weight) * np.sqrt((inputs**2).sum(0))
    kept = np.ones(weight.shape, bool)
    for row, line in zip(kept, score, strict=True):
        row[np.argsort(line, kind="stable")[: int(len(line) * (1 - density) + 1e-9)]] = False
    return kept


def rigl(weight, gradient, kept, fraction):
    """Drop by |w|, grow by |g| among what is then off; arXiv:1911.11134."""
    w, g, on = weight.ravel(), gradient.ravel(), kept.ravel().copy()
    count = int(on.sum() * fraction)
    was = on.copy()
    for place in sorted(np.flatnonzero(on), key=lambda i: abs(w[i]))[:count]:
        on[place] = False
    for place in sorted(np.flatnonzero(~on), key=lambda i: -abs(g[i]))[:count]:
        on[place] = True
    return on.reshape(kept.shape), np.where(on & was, w, 0).reshape(kept.shape)


def slow_tables(keys, capacity):
    """One dictionary of first-in-first-out lists a table."""
    tables = []
    for column in keys.T.tolist():
        table = defaultdict(list)
        for neuron, key in enumerate(column):
            table[key] = [*table[key], neuron][-capacity:]
        tables.append(table)
    return tables
