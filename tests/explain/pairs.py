"""Prompts of random tokens for tests that need no task, and a rank correlation."""

import numpy as np
import torch

from fewedges.explain.tasks.prompts import Prompts


def random_prompts(count=5, length=7, vocabulary=61, seed=0, metric="logit_diff"):
    """Clean and corrupt prompts that differ at tokens 2 to 4; lengths vary, the rest is padding.

    Token 0 is left out: its embedding is 0, where an RMS norm is 1000 times steeper than elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, vocabulary, (count, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2:5] = torch.randint(1, vocabulary, (count, 3), generator=generator)
    last = torch.tensor([length - 1 - (n % 3 if length > 3 else 0) for n in range(count)])
    return Prompts(
        name="random",
        metric=metric,
        clean=clean,
        corrupt=corrupt,
        last=last,
        answers=tuple((n % 7, 8) for n in range(count)),
        wrong=tuple((n % 7 + 20, 30, 40) for n in range(count)),
        template=tuple(n % 2 for n in range(count)),
        texts=(("clean", "corrupt"),) * count,
    )


def ranks(x):
    return np.argsort(np.argsort(x))


def rank_correlation(a, b):
    """Spearman's, for numbers without ties."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
