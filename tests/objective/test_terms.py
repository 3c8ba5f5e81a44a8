"""The weighted sum of the terms, and the contrastive term of embeddings that are cut."""

import math
from types import SimpleNamespace

import pytest
import torch

from ragcun_hf.objective.losses import info_nce_loss, triplet_margin_loss
from ragcun_hf.objective.terms import Objective

IDS = torch.arange(4)
GENERATOR = torch.Generator().manual_seed(0)
EMBEDDINGS = torch.randn(8, 6, generator=GENERATOR)


def _terms(embeddings, **fields):
    objective = Objective({"contrastive": 1.0}, **fields)
    return objective.terms(SimpleNamespace(embeddings=embeddings), IDS, IDS + 10)["contrastive"]


@pytest.mark.parametrize("kind", ["info_nce", "triplet"])
def test_a_cut_contrastive_term_is_the_mean_over_the_widths_and_the_whole(kind):
    loss = info_nce_loss if kind == "info_nce" else triplet_margin_loss
    parts = [loss(EMBEDDINGS[:4, :width], EMBEDDINGS[4:, :width]) for width in (2, 3, 6)]
    found = _terms(EMBEDDINGS, contrastive_kind=kind, matryoshka_dims=(2, 3))
    torch.testing.assert_close(found, torch.stack(parts).mean())
    assert _terms(EMBEDDINGS, contrastive_kind=kind) == parts[-1]


def test_a_cut_term_worked_by_hand():
    # Cut to one coordinate, cosine similarities are 1 or -1: each query agrees with its own document and with one of
    # the three others, so the loss is log(2 + 2 exp(-2)) at temperature 1.
    queries = torch.tensor([[1.0, 0, 3, 0], [1, 0, 0, 3], [-1, 0, 3, 0], [-1, 0, 0, 3]])
    whole = float(info_nce_loss(queries, queries, temperature=1.0))
    cut = math.log(2 + 2 * math.exp(-2))
    found = _terms(torch.cat([queries, queries]), temperature=1.0, matryoshka_dims=(1,))
    assert float(found) == pytest.approx((whole + cut) / 2, abs=1e-6)


def test_narrow_widths_get_their_own_gradient():
    embeddings = EMBEDDINGS.clone().requires_grad_()
    _terms(embeddings, matryoshka_dims=(2,)).backward()
    plain = EMBEDDINGS.clone().requires_grad_()
    _terms(plain).backward()
    assert (embeddings.grad[:, :2] - plain.grad[:, :2] / 2).norm() > 1e-3
    torch.testing.assert_close(embeddings.grad[:, 2:], plain.grad[:, 2:] / 2)
