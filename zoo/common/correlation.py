"""Spearman's rank correlation. Numbers in, no torch, no scipy."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["rank_correlation"]


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's correlation of the ranks of two arrays of shape (N,); tied values share a rank.

    NaN if the values of one array are all equal.
    """
    a, b = (ranks - ranks.mean() for ranks in (_ranks(left), _ranks(right)))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ascending ranks from 0; tied values share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[which]
