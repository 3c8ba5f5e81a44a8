"""The loss terms in one process: values by hand, slow independent versions, gradients, dtypes."""

import math

import numpy as np
import pytest
import torch

from ragcun_hf.objective import isotropy
from ragcun_hf.objective.isotropy import (
    SIGREG_NULL_FLOOR,
    covariance_isotropy_loss,
    random_directions,
    sigreg_loss,
    sigreg_statistic,
)
from ragcun_hf.objective.known_pairs import KnownPairs
from ragcun_hf.objective.losses import info_nce_loss, predictive_loss, similarity_scores, triplet_margin_loss


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


QUERIES, DOCUMENTS = _random(6, 5), _random(9, 5, seed=1)
TERMS = {
    "info_nce": lambda x: info_nce_loss(x, DOCUMENTS.to(x.dtype)),
    "info_nce_both": lambda x: info_nce_loss(x, DOCUMENTS.to(x.dtype), is_bidirectional=True),
    "info_nce_dot": lambda x: info_nce_loss(x, DOCUMENTS.to(x.dtype), similarity="dot"),
    "info_nce_euclidean": lambda x: info_nce_loss(x, DOCUMENTS.to(x.dtype), similarity="euclidean"),
    "triplet": lambda x: triplet_margin_loss(x, DOCUMENTS.to(x.dtype), margin=1.0),
    "sigreg": lambda x: sigreg_loss(x, num_directions=32),
    "covariance": covariance_isotropy_loss,
    "predictive": lambda x: predictive_loss(x, DOCUMENTS[:6].to(x.dtype)),
    "predictive_cosine": lambda x: predictive_loss(x, DOCUMENTS[:6].to(x.dtype), kind="cosine"),
}
each_term = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())


@each_term
def test_gradient_is_finite_and_not_zero_in_every_row(term):
    queries = QUERIES.clone().requires_grad_()
    term(queries).backward()
    assert torch.isfinite(queries.grad).all()
    assert (queries.grad.norm(dim=1) > 1e-8).any()
    assert queries.grad.norm() > 1e-4


@each_term
def test_value_is_a_float32_scalar_for_bfloat16_input_and_close_to_the_float32_value(term):
    value = term(QUERIES.bfloat16())
    assert (value.dtype, value.shape) == (torch.float32, ())
    assert value.item() == pytest.approx(term(QUERIES).item(), rel=0.05)
    # The computation itself is in float32, so only the input is rounded.
    assert value.item() == pytest.approx(term(QUERIES.bfloat16().float()).item(), rel=0.02)


@each_term
def test_autocast_around_a_term_does_not_change_it(term):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(QUERIES)
    assert value.dtype == torch.float32
    assert value.item() == term(QUERIES).item()


@each_term
def test_gradient_under_autocast_reaches_bfloat16_input(term):
    queries = QUERIES.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(queries)
    loss.backward()
    assert queries.grad.dtype == torch.bfloat16
    assert torch.isfinite(queries.grad).all()
    assert queries.grad.abs().sum() > 0


# InfoNCE


def _slow_info_nce(
    queries, documents, temperature=0.05, similarity="cosine", query_ids=None, document_ids=None, known=()
):
    """One query after the other, in plain Python."""
    rows = []
    for i, query in enumerate(queries.tolist()):
        scores = []
        for j, document in enumerate(documents.tolist()):
            dot = sum(a * b for a, b in zip(query, document, strict=True))
            if similarity == "cosine":
                dot /= math.hypot(*query) * math.hypot(*document)
            elif similarity == "dot":
                dot /= len(query)
            else:
                dot = -(math.dist(query, document) ** 2) / (2 * len(query))
            same_document = document_ids is not None and document_ids[i] == document_ids[j]
            same_query = query_ids is not None and j < len(queries) and query_ids[i] == query_ids[j]
            is_known = bool(known) and (query_ids[i], document_ids[j]) in known
            if j == i or not (same_document or same_query or is_known):
                scores.append((j == i, dot / temperature))
        total = math.log(sum(math.exp(score) for _, score in scores))
        rows.append(total - next(score for is_own, score in scores if is_own))
    return sum(rows) / len(rows)


def test_info_nce_of_a_case_done_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    documents = torch.tensor([[2.0, 0.0], [3.0, 3.0]])
    # Cosines: 1 and 1/sqrt(2) for the first query, 0 and 1/sqrt(2) for the second; temperature 0.5 doubles them.
    first = math.log(math.exp(2.0) + math.exp(math.sqrt(2))) - 2.0
    second = math.log(1.0 + math.exp(math.sqrt(2))) - math.sqrt(2)
    assert info_nce_loss(queries, documents, temperature=0.5).item() == pytest.approx((first + second) / 2, abs=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_info_nce_equals_the_slow_version(similarity, temperature):
    value = info_nce_loss(QUERIES, DOCUMENTS, temperature=temperature, similarity=similarity)
    expected = _slow_info_nce(QUERIES, DOCUMENTS, temperature=temperature, similarity=similarity)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_with_repetitions_equals_the_slow_version():
    query_ids, document_ids = torch.tensor([1, 2, 1, 3, 4, 5]), torch.tensor([7, 8, 9, 8, 6, 5, 9, 4, 4])
    value = info_nce_loss(QUERIES, DOCUMENTS, query_ids=query_ids, document_ids=document_ids)
    expected = _slow_info_nce(QUERIES, DOCUMENTS, query_ids=query_ids.tolist(), document_ids=document_ids.tolist())
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert abs(value.item() - info_nce_loss(QUERIES, DOCUMENTS).item()) > 1e-3


KNOWN = {(1, 7), (1, 9), (2, 8), (3, 8), (4, 6), (5, 5), *((1, 4), (2, 5), (4, 7), (5, 6))}  # the last: no rows below
KNOWN_PAIRS = KnownPairs(*(torch.tensor(ids) for ids in zip(*sorted(KNOWN), strict=True)))


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_info_nce_leaves_out_documents_that_are_known_to_answer_a_query(is_bidirectional):
    query_ids, document_ids = [1, 2, 1, 3, 4, 5], [7, 8, 9, 8, 6, 5, 9, 4, 4]
    ids = {"query_ids": torch.tensor(query_ids), "document_ids": torch.tensor(document_ids)}
    options = {"is_bidirectional": is_bidirectional, "temperature": 1.0, **ids}
    value = info_nce_loss(QUERIES, DOCUMENTS, known_pairs=KNOWN_PAIRS, **options).item()
    slow = {"temperature": 1.0, "query_ids": query_ids, "document_ids": document_ids, "known": KNOWN}
    expected = _slow_info_nce(QUERIES, DOCUMENTS, **slow)
    if is_bidirectional:
        turned = {(document, query) for query, document in KNOWN}
        slow = {"temperature": 1.0, "query_ids": document_ids[:6], "document_ids": query_ids, "known": turned}
        expected = (expected + _slow_info_nce(DOCUMENTS[:6], QUERIES, **slow)) / 2
    assert value == pytest.approx(expected, rel=1e-5)
    assert abs(value - info_nce_loss(QUERIES, DOCUMENTS, **options).item()) > 1e-3


def test_info_nce_of_equal_scores_is_the_logarithm_of_the_number_of_candidates():
    assert info_nce_loss(torch.ones(3, 4), torch.ones(5, 4)).item() == pytest.approx(math.log(5), abs=1e-6)


def test_a_smaller_temperature_lowers_the_loss_of_correct_rankings():
    queries = torch.eye(4)
    values = [info_nce_loss(queries, queries, temperature=t).item() for t in (0.05, 0.5, 5.0)]
    assert values == sorted(values)
    assert values[0] < 1e-6
    assert values[2] > 1.0


def test_hard_negatives_are_candidates_of_every_query():
    with_negatives = info_nce_loss(QUERIES, DOCUMENTS)
    assert with_negatives > info_nce_loss(QUERIES, DOCUMENTS[:6]) + 1e-3
    # A negative equal to its query is the hardest possible.
    worst = torch.cat([DOCUMENTS[:6], QUERIES[3:4]])
    assert info_nce_loss(QUERIES, worst) > info_nce_loss(QUERIES, DOCUMENTS[:6]) + 0.1


def test_a_repeated_document_is_no_negative_of_its_other_queries():
    # Rows 0 and 1 have the same document; each ignores the copy in the other row.
    documents = torch.cat([DOCUMENTS[:1], DOCUMENTS[:1], DOCUMENTS[2:]])
    ids = torch.tensor([5, 5, 2, 3, 4, 0, 6, 7, 8])
    value = info_nce_loss(QUERIES, documents, document_ids=ids)
    without_copy = torch.cat([documents[:1], documents[2:]])
    expected = (
        _slow_info_nce(QUERIES[:1], without_copy)
        + _slow_info_nce(QUERIES[1:2], without_copy)
        + sum(_slow_info_nce(QUERIES[i : i + 1], documents.roll(-i, 0)) for i in range(2, 6))
    ) / 6
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_the_other_document_of_a_repeated_query_is_no_negative():
    ids = torch.tensor([1, 1, 2, 3, 4, 5])
    value = info_nce_loss(QUERIES, DOCUMENTS, query_ids=ids)
    expected = (
        _slow_info_nce(QUERIES[:1], torch.cat([DOCUMENTS[:1], DOCUMENTS[2:]]))
        + _slow_info_nce(QUERIES[1:2], DOCUMENTS[1:])
        + sum(_slow_info_nce(QUERIES[i : i + 1], DOCUMENTS.roll(-i, 0)) for i in range(2, 6))
    ) / 6
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_a_hard_negative_that_equals_the_query_s_own_document_is_left_out():
    documents = torch.cat([DOCUMENTS[:6], DOCUMENTS[:1]])
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    masked = info_nce_loss(QUERIES, documents, document_ids=ids)
    rows = [_slow_info_nce(QUERIES[:1], DOCUMENTS[:6])]
    rows += [_slow_info_nce(QUERIES[i : i + 1], documents.roll(-i, 0)) for i in range(1, 6)]
    assert masked.item() == pytest.approx(sum(rows) / 6, rel=1e-5)


def test_distinct_ids_mask_nothing_even_if_they_are_negative():
    ids = torch.tensor([-1, -2, -3, 4, 5, 6, 7, 8, 9])
    plain = info_nce_loss(QUERIES, DOCUMENTS).item()
    assert info_nce_loss(QUERIES, DOCUMENTS, document_ids=ids).item() == plain


def test_the_bidirectional_loss_is_the_mean_of_both_directions():
    documents = DOCUMENTS[:6]
    both = info_nce_loss(QUERIES, DOCUMENTS, is_bidirectional=True).item()
    # Hard negatives take part in the first direction only.
    expected = (_slow_info_nce(QUERIES, DOCUMENTS) + _slow_info_nce(documents, QUERIES)) / 2
    assert both == pytest.approx(expected, rel=1e-5)
    assert abs(both - info_nce_loss(QUERIES, DOCUMENTS).item()) > 1e-3


def test_both_directions_mask_repeated_texts_with_exchanged_roles():
    query_ids, document_ids = torch.tensor([1, 2, 1, 3, 4, 5]), torch.tensor([7, 8, 9, 8, 6, 5])
    both = info_nce_loss(
        QUERIES, DOCUMENTS[:6], query_ids=query_ids, document_ids=document_ids, is_bidirectional=True
    ).item()
    q, d = query_ids.tolist(), document_ids.tolist()
    forth = _slow_info_nce(QUERIES, DOCUMENTS[:6], query_ids=q, document_ids=d)
    back = _slow_info_nce(DOCUMENTS[:6], QUERIES, query_ids=d, document_ids=q)
    assert both == pytest.approx((forth + back) / 2, rel=1e-5)


def test_the_three_similarities_agree_for_vectors_whose_length_is_the_root_of_the_width():
    queries = torch.nn.functional.normalize(QUERIES, dim=1) * math.sqrt(5)
    documents = torch.nn.functional.normalize(DOCUMENTS, dim=1) * math.sqrt(5)
    cosine, dot, euclidean = (similarity_scores(queries, documents, s) for s in ("cosine", "dot", "euclidean"))
    assert torch.allclose(dot, cosine, atol=1e-6)
    assert torch.allclose(euclidean, cosine - 1, atol=1e-6)  # the same slope, so one temperature suits all
    assert torch.equal(euclidean.argsort(1), cosine.argsort(1))
    values = [info_nce_loss(queries, documents, similarity=s).item() for s in ("cosine", "dot", "euclidean")]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_info_nce_ignores_the_order_of_rows():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    documents = torch.cat([DOCUMENTS[:6][order], DOCUMENTS[6:].flip(0)])
    value = info_nce_loss(QUERIES[order], documents, is_bidirectional=True)
    assert value.item() == pytest.approx(info_nce_loss(QUERIES, DOCUMENTS, is_bidirectional=True).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [info_nce_loss, triplet_margin_loss])
@pytest.mark.parametrize(
    ("queries", "documents"),
    [((4, 5), (3, 5)), ((4, 5), (4, 6)), ((5,), (5,)), ((2, 3, 4), (2, 3, 4)), ((0, 5), (4, 5))],
)
def test_contrastive_terms_refuse_shapes_that_do_not_fit(loss, queries, documents):
    with pytest.raises(ValueError, match="Expected"):
        loss(torch.zeros(queries), torch.zeros(documents))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_info_nce_refuses_a_temperature_that_is_not_above_zero(temperature):
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        info_nce_loss(QUERIES, DOCUMENTS, temperature=temperature)


def test_an_unknown_similarity_is_refused():
    with pytest.raises(ValueError, match="`similarity` must be cosine, dot or euclidean"):
        info_nce_loss(QUERIES, DOCUMENTS, similarity="manhattan")


# Triplet margin


def _slow_triplet(queries, documents, margin, query_ids=None, document_ids=None, known=()):
    rows = []
    for i, query in enumerate(queries.tolist()):
        others = [
            math.dist(query, document)
            for j, document in enumerate(documents.tolist())
            if j != i
            and not (document_ids is not None and document_ids[i] == document_ids[j])
            and not (query_ids is not None and j < len(queries) and query_ids[i] == query_ids[j])
            and not (known and (query_ids[i], document_ids[j]) in known)
        ]
        own = math.dist(query, documents[i].tolist())
        rows.append(max(0.0, own - min(others) + margin) if others else 0.0)
    return sum(rows) / len(rows)


def test_triplet_margin_of_a_case_done_by_hand():
    queries, documents = torch.tensor([[0.0], [10.0]]), torch.tensor([[3.0], [6.0], [1.0]])
    # Row 0: own 3, others 6 and 1, the hardest 1: 3 - 1 + 0.5 = 2.5. Row 1: own 4, hardest 7: below 0, so 0.
    assert triplet_margin_loss(queries, documents, margin=0.5).item() == pytest.approx(1.25)


@pytest.mark.parametrize("with_ids", [False, True])
def test_triplet_margin_equals_the_slow_version(with_ids):
    ids = {"query_ids": [1, 2, 1, 3, 4, 5], "document_ids": [7, 8, 9, 8, 6, 5, 9, 4, 4]} if with_ids else {}
    value = triplet_margin_loss(
        QUERIES, DOCUMENTS, margin=0.7, **{name: torch.tensor(values) for name, values in ids.items()}
    )
    assert value.item() == pytest.approx(_slow_triplet(QUERIES, DOCUMENTS, 0.7, **ids), rel=1e-5)
    assert value > 0.1


def test_triplet_margin_leaves_out_documents_that_are_known_to_answer_a_query():
    ids = {"query_ids": [1, 2, 1, 3, 4, 5], "document_ids": [7, 8, 9, 8, 6, 5, 9, 4, 4]}
    tensors = {name: torch.tensor(values) for name, values in ids.items()}
    value = triplet_margin_loss(QUERIES, DOCUMENTS, margin=0.7, known_pairs=KNOWN_PAIRS, **tensors).item()
    assert value == pytest.approx(_slow_triplet(QUERIES, DOCUMENTS, 0.7, **ids, known=KNOWN), rel=1e-5)
    assert abs(value - triplet_margin_loss(QUERIES, DOCUMENTS, margin=0.7, **tensors).item()) > 1e-3


def test_triplet_margin_takes_the_hardest_negative():
    near = torch.cat([DOCUMENTS[:6], QUERIES[2:3] + 0.01])
    # Only row 2 has such a near negative; it can only make the hardest negative of another row harder.
    value = triplet_margin_loss(QUERIES[2:3], torch.cat([DOCUMENTS[2:3], near]), margin=0.1).item()
    own = math.dist(QUERIES[2].tolist(), DOCUMENTS[2].tolist())
    assert value == pytest.approx(own - 0.01 * math.sqrt(5) + 0.1, abs=1e-5)


def test_a_single_row_without_negatives_has_no_triplet_loss_and_no_broken_gradient():
    query = QUERIES[:1].clone().requires_grad_()
    loss = triplet_margin_loss(query, DOCUMENTS[:1], margin=5.0)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(query.grad, torch.zeros_like(query))


def test_triplet_margin_has_a_finite_gradient_where_query_and_document_coincide():
    query = QUERIES[:3].clone().requires_grad_()
    triplet_margin_loss(query, query.detach().clone(), margin=100.0).backward()
    assert torch.isfinite(query.grad).all()


def test_triplet_margin_ignores_the_order_of_rows():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    documents = torch.cat([DOCUMENTS[:6][order], DOCUMENTS[6:]])
    expected = triplet_margin_loss(QUERIES, DOCUMENTS, margin=1.0).item()
    assert triplet_margin_loss(QUERIES[order], documents, margin=1.0).item() == pytest.approx(expected, rel=1e-6)


# SIGReg


def _reference_case():
    n, d, k = torch.arange(1.0, 65.0), torch.arange(1.0, 9.0), torch.arange(1.0, 33.0)
    x = 1.3 * torch.sin(0.7 * n[:, None] * d + d) + 0.2
    directions = torch.cos(0.37 * d[:, None] * k + 0.1)
    return x, directions / directions.norm(dim=0)


def test_sigreg_equals_the_published_minimal_version():
    # The value was computed once with the SIGReg module of MINIMAL.md, github.com/rbalestr-lab/lejepa at 2f2d970.
    assert sigreg_statistic(*_reference_case()).item() == pytest.approx(7.112064361572266, abs=1e-5)


def _slow_sigreg(x, directions):
    """Knot by knot, direction by direction, row by row, in plain Python."""
    knots = [3.0 * i / 16 for i in range(17)]
    values = []
    for direction in directions.T.tolist():
        projected = [sum(a * b for a, b in zip(row, direction, strict=True)) for row in x.tolist()]
        integral = 0.0
        for i, t in enumerate(knots):
            real = sum(math.cos(t * p) for p in projected) / len(projected)
            imaginary = sum(math.sin(t * p) for p in projected) / len(projected)
            normal = math.exp(-t * t / 2)
            weight = 3.0 / 16 * (0.5 if i in (0, 16) else 1.0)
            integral += 2 * weight * ((real - normal) ** 2 + imaginary**2) * normal
        values.append(integral * len(projected))
    return sum(values) / len(values)


def test_sigreg_equals_the_slow_version():
    x, directions = _reference_case()
    assert sigreg_statistic(x[:20], directions[:, :6]).item() == pytest.approx(
        _slow_sigreg(x[:20], directions[:, :6]), rel=1e-5
    )


def test_sigreg_of_a_collapsed_batch_done_by_hand():
    # Every projection is 0: phi(t) = 1, so T / N is the quadrature of (1 - exp(-t^2 / 2))^2 exp(-t^2 / 2).
    knots = np.linspace(0, 3, 17)
    normal = np.exp(-(knots**2) / 2)
    by_hand = 2 * np.trapezoid((1 - normal) ** 2 * normal, knots)
    assert sigreg_loss(torch.zeros(50, 4)).item() == pytest.approx(by_hand, abs=1e-6)
    assert by_hand == pytest.approx(0.40, abs=0.01)


def test_sigreg_equals_the_integral_up_to_the_error_of_its_quadrature():
    from scipy.integrate import quad

    x, directions = _reference_case()
    projected = (x.double() @ directions.double()).numpy()

    def integrand(t, column):
        normal = math.exp(-t * t / 2)
        error = (np.cos(t * column).mean() - normal) ** 2 + np.sin(t * column).mean() ** 2
        return error * normal

    exact = np.mean([len(x) * quad(integrand, -3, 3, args=(column,), limit=200)[0] for column in projected.T])
    # 17 knots leave an error of a few hundredths of a percent on data of this scale.
    assert sigreg_statistic(x, directions).item() == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(("rows", "width", "repetitions"), [(64, 4, 300), (64, 256, 60), (512, 32, 60)])
def test_sigreg_of_gaussian_samples_is_near_the_null_floor_for_every_size(rows, width, repetitions):
    values = [
        sigreg_statistic(_random(rows, width, seed=seed), random_directions(width, 64, seed=1000 + seed)).item()
        for seed in range(repetitions)
    ]
    # The tolerance is four standard errors, measured per case.
    error = np.std(values) / math.sqrt(len(values))
    assert error < 0.04
    assert np.mean(values) == pytest.approx(SIGREG_NULL_FLOOR, abs=4 * error)


def test_the_sigreg_null_floor_equals_the_expected_value():
    # E|phi_N - phi|^2 = (1 - phi^2) / N for samples of N(0, 1): T's mean is the integral of (1 - phi^2) phi.
    knots = np.linspace(0, 3, 17)
    normal = np.exp(-(knots**2) / 2)
    assert 2 * np.trapezoid((1 - normal**2) * normal, knots) == pytest.approx(SIGREG_NULL_FLOOR, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scale", lambda x: 2 * x),
        ("small scale", lambda x: x / 2),
        ("mean", lambda x: x + 1),
        ("one long axis", lambda x: x * torch.tensor([6.0] + [1.0] * 15)),
        ("unit length", lambda x: torch.nn.functional.normalize(x, dim=1)),
        ("shape", lambda x: x.sign()[:, :1].expand(-1, 16).clone()),
        ("collapse", lambda x: 0 * x),
    ],
)
def test_sigreg_is_larger_for_samples_of_other_distributions(name, change):
    x = _random(512, 16)
    null = 512 * sigreg_loss(x).item()
    wrong = 512 * sigreg_loss(change(x)).item()
    assert null < 1.5, name
    assert wrong > 5, name


def test_unit_length_vectors_score_like_a_collapse():
    x = torch.nn.functional.normalize(_random(512, 256), dim=1)
    assert sigreg_loss(x).item() == pytest.approx(0.40, abs=0.01)
    assert 512 * sigreg_loss(x * 16).item() == pytest.approx(1.0, abs=0.2)


def test_sigreg_loss_is_the_statistic_over_the_number_of_rows():
    x = _random(40, 6)
    statistic = sigreg_statistic(x, random_directions(6, 24, seed=9))
    assert sigreg_loss(x, num_directions=24, seed=9).item() == pytest.approx(statistic.item() / 40, rel=1e-6)


def test_sigreg_loss_of_wrong_data_does_not_grow_with_the_batch():
    values = [sigreg_loss(3 * _random(rows, 8)).item() for rows in (256, 2048)]
    assert values[0] == pytest.approx(values[1], rel=0.05)


@pytest.mark.parametrize("elements", [1, 64 * 5, 2**30])
def test_chunks_do_not_change_sigreg_or_its_gradient(monkeypatch, elements):
    x, directions = _reference_case()
    expected_x = x.clone().requires_grad_()
    expected = sigreg_statistic(expected_x, directions)
    expected.backward()
    monkeypatch.setattr(isotropy, "ELEMENTS_AT_ONCE", elements)
    x.requires_grad_()
    value = sigreg_statistic(x, directions)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(x.grad, expected_x.grad, atol=1e-6)


def test_sigreg_ignores_the_order_of_rows():
    x = _random(32, 4)
    assert sigreg_loss(x.flip(0)).item() == pytest.approx(sigreg_loss(x).item(), rel=1e-5)


def test_only_the_seed_decides_the_directions():
    x = 2 * _random(32, 4)
    torch.manual_seed(5)
    first = sigreg_loss(x, seed=1).item()
    torch.manual_seed(6)
    assert sigreg_loss(x, seed=1).item() == first
    assert sigreg_loss(x, seed=2).item() != first


def test_directions_have_length_one_and_spread_over_the_sphere():
    directions = random_directions(3, 4000, seed=0)
    assert torch.allclose(directions.norm(dim=0), torch.ones(4000), atol=1e-6)
    assert torch.allclose(directions @ directions.T / 4000, torch.eye(3) / 3, atol=0.02)
    assert directions.mean(dim=1).abs().max() < 0.03


def test_gradient_descent_on_sigreg_makes_a_batch_gaussian():
    x = (0.2 * _random(128, 3) + 1).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        sigreg_loss(x, num_directions=32, seed=step).backward()
        optimizer.step()
    assert x.mean(0).abs().max() < 0.1
    assert (x.std(0) - 1).abs().max() < 0.15


@pytest.mark.parametrize("loss", [sigreg_loss, covariance_isotropy_loss])
@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (4,), (2, 3, 4)])
def test_isotropy_terms_refuse_one_row_and_wrong_shapes(loss, shape):
    with pytest.raises(ValueError, match="at least two rows|of shape"):
        loss(torch.ones(shape))


def test_sigreg_refuses_no_directions():
    with pytest.raises(ValueError, match="`num_directions` must be at least 1"):
        sigreg_loss(QUERIES, num_directions=0)


# Covariance


def test_covariance_isotropy_of_a_case_done_by_hand():
    # Two columns equal, variance 2 each (rows +-sqrt(2) * sqrt(1/2) ... over N - 1): rows (1, 1), (-1, -1):
    # variance 2, covariance 2, mean variance 2, residual [[0, 2], [2, 0]], norm sqrt(8), over D = 2: sqrt(2).
    rows = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) + 5.0
    assert covariance_isotropy_loss(rows).item() == pytest.approx(math.sqrt(2), rel=1e-6)


def test_covariance_isotropy_equals_an_independent_version():
    x = _random(30, 7).numpy().astype(np.float64)
    covariance = np.cov(x, rowvar=False)
    expected = np.linalg.norm(covariance - np.trace(covariance) / 7 * np.eye(7)) / 7
    assert covariance_isotropy_loss(torch.tensor(x)).item() == pytest.approx(expected, rel=1e-5)


def test_covariance_isotropy_is_zero_for_isotropic_rows_of_any_scale_and_mean():
    rows = 3 * torch.cat([torch.eye(4), -torch.eye(4)]) + 2
    assert covariance_isotropy_loss(rows).item() < 1e-6


@pytest.mark.parametrize("rows", [torch.ones(5, 3), torch.cat([torch.eye(2), -torch.eye(2)])])
def test_covariance_isotropy_has_a_finite_gradient_where_it_is_zero(rows):
    rows = rows.clone().requires_grad_()
    covariance_isotropy_loss(rows).backward()
    assert torch.isfinite(rows.grad).all()


def test_covariance_isotropy_ignores_the_order_of_rows():
    x = _random(20, 4)
    assert covariance_isotropy_loss(x.flip(0)).item() == pytest.approx(covariance_isotropy_loss(x).item(), rel=1e-6)


# Predictive


def test_predictive_loss_of_cases_done_by_hand():
    predictions, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    # Squared differences 4, 16, 0, 9: mean 29 / 4. Cosines 3 / 5 and -1: losses 0.4 and 2.
    assert predictive_loss(predictions, targets).item() == pytest.approx(7.25)
    assert predictive_loss(predictions, targets, kind="cosine").item() == pytest.approx(1.2)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_predictive_loss_equals_the_slow_version(kind):
    rows = []
    for p, t in zip(QUERIES.tolist(), DOCUMENTS[:6].tolist(), strict=True):
        if kind == "mse":
            rows.append(sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / 5)
        else:
            rows.append(1 - sum(a * b for a, b in zip(p, t, strict=True)) / math.hypot(*p) / math.hypot(*t))
    value = predictive_loss(QUERIES, DOCUMENTS[:6], kind=kind).item()
    assert value == pytest.approx(sum(rows) / 6, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_no_gradient_reaches_the_targets(kind):
    predictions, targets = QUERIES.clone().requires_grad_(), DOCUMENTS[:6].clone().requires_grad_()
    predictive_loss(predictions, targets, kind=kind).backward()
    assert targets.grad is None
    assert predictions.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_predictive_loss_ignores_the_order_of_rows(kind):
    value = predictive_loss(QUERIES.flip(0), DOCUMENTS[:6].flip(0), kind=kind).item()
    assert value == pytest.approx(predictive_loss(QUERIES, DOCUMENTS[:6], kind=kind).item(), rel=1e-6)


def test_predictive_loss_refuses_other_shapes_and_kinds():
    with pytest.raises(ValueError, match="needs two"):
        predictive_loss(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="needs two"):
        predictive_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="`kind` must be mse or cosine"):
        predictive_loss(QUERIES, QUERIES, kind="l1")
