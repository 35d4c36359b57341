"""Artificial states, and the metrics written out in plain NumPy loops to check against."""

import numpy as np


def realistic(languages=5, number=60, width=48, noise=1.0, seed=0):
    """[G, N, D] float32: meaning + language + noise, anisotropic, with hubs and duplicates."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(3.0, 0.1, width)
    meaning = rng.normal(size=(number, width)) * scales
    meaning[7] = meaning[3]  # one sentence twice
    meaning[11] = 0.3 * meaning.mean(axis=0)  # a hub: near to everything
    states = []
    for g in range(languages):
        turn, signs = np.linalg.qr(np.eye(width) + 0.01 * g * rng.normal(size=(width, width)))
        turn = turn * np.sign(np.diagonal(signs))
        rest = noise * (0.3 + 0.15 * g) * rng.normal(size=(number, width)) * scales
        one = (meaning + rest) @ turn + 0.7 * rng.normal(size=width) + 0.5
        one = one * rng.uniform(0.5, 20, size=(number, 1))
        one[7] = one[3]  # equal text has equal states
        states.append(one)
    return np.stack(states).astype(np.float32)


def cosine(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(x @ y / max(np.sqrt(x @ x) * np.sqrt(y @ y), 1e-300))


def cosines(x, y):
    return np.array([[cosine(a, b) for b in y] for a in x])


def scored(x, y, score, k):
    """[N, N] scores of one direction, candidate by candidate."""
    table = cosines(x, y)
    near_x = [np.mean(sorted(row)[::-1][:k]) for row in table]
    near_y = [np.mean(sorted(column)[::-1][:k]) for column in table.T]
    values = np.zeros_like(table)
    for i in range(len(x)):
        for j in range(len(y)):
            if score == "cosine":
                values[i, j] = table[i, j]
            elif score == "csls":
                values[i, j] = 2 * table[i, j] - near_x[i] - near_y[j]
            else:
                values[i, j] = table[i, j] / (near_x[i] / 2 + near_y[j] / 2)
    return values


def retrieval(states, score, k, groups=None):
    groups = np.arange(states.shape[1]) if groups is None else groups
    shares = np.full((len(states), len(states)), np.nan)
    for a, x in enumerate(states):
        for b, y in enumerate(states):
            if a != b:
                values, right = scored(x, y, score, k), groups[:, None] == groups
                best = np.where(right, values, -np.inf).max(axis=1)
                rival = np.where(right, -np.inf, values).max(axis=1)
                shares[a, b] = np.mean(best > rival)  # a tie is not a hit
    return shares


def mexa(states, pivot):
    """mu(C) of the paper: c_ii above every c_ij and every c_ji."""
    shares = []
    for x in states:
        table = cosines(x, states[pivot])
        number = len(table)
        hits = 0
        for i in range(number):
            rivals = [table[i, j] for j in range(number) if j != i]
            rivals += [table[j, i] for j in range(number) if j != i]
            hits += table[i, i] > max(rivals)
        shares.append(hits / number)
    return np.array(shares)
