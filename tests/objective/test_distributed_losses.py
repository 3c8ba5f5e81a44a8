"""Processes with different numbers of rows compute the loss and the gradient of one process with all rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The script of each process; a single process computes the reference. Every case uses a small linear layer, whose
# gradient is averaged over processes as in DistributedDataParallel.
WORKER = '''
import json
import sys

import torch
import torch.distributed as dist

from ragcun_hf import distributed
from ragcun_hf.objective import isotropy, losses
from ragcun_hf.objective.isotropy import covariance_isotropy_loss, sigreg_loss
from ragcun_hf.objective.known_pairs import KnownPairs
from ragcun_hf.objective.losses import info_nce_loss, predictive_loss, triplet_margin_loss

torch.set_num_threads(1)
QUERY_IDS = [1, 2, 3, 4, 1, 5, 6, 7, 2, 8]
DOCUMENT_IDS = [11, 12, 13, 14, 15, 12, 16, 17, 18, 13]
NEGATIVE_IDS = [19, 20, 11, 21]
# Also known, beside the rows themselves: pairs 1 and 6, 6 and 0 answer each other, negative 3 answers pair 3.
KNOWN = KnownPairs(torch.tensor([*QUERY_IDS, 2, 6, 4]), torch.tensor([*DOCUMENT_IDS, 16, 11, 21]))


def info(q, d, p, ids):
    return info_nce_loss(q, d)


def info_ids(q, d, p, ids):
    return info_nce_loss(q, d, **ids)


def info_both(q, d, p, ids):
    return info_nce_loss(q, d, is_bidirectional=True, **ids)


def info_known(q, d, p, ids):
    return info_nce_loss(q, d, is_bidirectional=True, known_pairs=KNOWN, **ids)


def triplet_known(q, d, p, ids):
    return triplet_margin_loss(q, d, margin=1.0, known_pairs=KNOWN, **ids)


def info_euclidean(q, d, p, ids):
    return info_nce_loss(q, d, similarity="euclidean", temperature=0.5, **ids)


def triplet(q, d, p, ids):
    return triplet_margin_loss(q, d, margin=1.0, **ids)


def sigreg(q, d, p, ids):
    return sigreg_loss(torch.cat([q, d]), num_directions=16, seed=4)


def covariance(q, d, p, ids):
    return covariance_isotropy_loss(torch.cat([q, d]))


def mse(q, d, p, ids):
    return predictive_loss(p, d[: len(q)])


def cosine(q, d, p, ids):
    return predictive_loss(p, d[: len(q)], kind="cosine")


def total(q, d, p, ids):
    return info_both(q, d, p, ids) + 1.5 * sigreg(q, d, p, ids) + 1.2 * mse(q, d, p, ids)


CONTRASTIVE = [info, info_ids, info_both, info_known, info_euclidean, triplet, triplet_known]
TERMS = [*CONTRASTIVE, sigreg, covariance, mse, cosine, total]


def batch(pairs, negatives):
    """Return the rows of some pairs and hard negatives of one fixed set."""
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(10, 6, generator=generator), torch.randn(14, 6, generator=generator)
    negative_rows = [10 + row for row in negatives]
    ids = [(DOCUMENT_IDS + NEGATIVE_IDS)[row] for row in [*pairs, *negative_rows]]
    return (
        queries[pairs],
        documents[[*pairs, *negative_rows]],
        {"query_ids": torch.tensor([QUERY_IDS[row] for row in pairs]), "document_ids": torch.tensor(ids)},
    )


def run(pairs, negatives, num_processes):
    queries, documents, ids = batch(pairs, negatives)
    results = {}
    for term in TERMS:
        torch.manual_seed(1)
        layer, predictor = torch.nn.Linear(6, 5), torch.nn.Linear(5, 5)
        q, d = layer(queries), layer(documents)
        loss = term(q, d, predictor(q), ids)
        loss.backward()
        parameters = [*layer.parameters(), *predictor.parameters()]
        gradient = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
        value = loss.detach().clone()
        if num_processes > 1:
            for tensor in (gradient, value):
                dist.all_reduce(tensor)
                tensor /= num_processes
        results[term.__name__] = {"loss": value.item(), "gradient": gradient.tolist()}
    return results


def discard_the_sum():
    real = isotropy.sum_over_processes
    isotropy.sum_over_processes = lambda x: (real(x), x)[1]


def gather_without_gradient():
    real = losses.gather_rows
    losses.gather_rows = lambda x: (real(x.detach())[0], real(x.detach())[1])


def keep_the_own_gradient():
    distributed._Sum.backward = staticmethod(lambda ctx, gradient: gradient)


def average_the_own_rows():
    losses.mean_over_processes = lambda values: values.mean()


def process(rank, num_processes, store, parts, output):
    for mistake in sys.argv[3:]:
        globals()[mistake]()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_processes)
    results = run(*parts[rank], num_processes)
    if rank == 0:
        with open(output, "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


def main():
    parts, folder = json.loads(sys.argv[1]), sys.argv[2]
    num_processes = len(parts)
    # Forking is quick, and safe here: no thread has been started yet.
    context = torch.multiprocessing.get_context("fork")
    arguments = (num_processes, f"{folder}/store", parts, f"{folder}/together.json")
    children = [context.Process(target=process, args=(rank, *arguments)) for rank in range(num_processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    if any(child.exitcode != 0 for child in children):
        sys.exit(f"exit codes {[child.exitcode for child in children]}")
    together = json.load(open(f"{folder}/together.json"))
    # All rows in one process: the pairs of all parts in rank order, then all hard negatives.
    alone = run(sum((pairs for pairs, _ in parts), []), sum((negatives for _, negatives in parts), []), 1)
    print(json.dumps({"together": together, "alone": alone}))


if __name__ == "__main__":
    main()
'''

CONTRASTIVE = "info info_ids info_both info_known info_euclidean triplet triplet_known".split()
TERMS = [*CONTRASTIVE, "sigreg", "covariance", "mse", "cosine", "total"]
# Pairs and hard negatives of each process. Pairs 0 and 4, 1 and 8 share a query, pairs 1 and 5, 2 and 9 a document,
# and negative 2 is the document of pair 0: each repeated text is on two processes.
TWO = [[[0, 1, 2, 3], [0]], [[4, 5, 6, 7, 8, 9], [1, 2, 3]]]
THREE = [[[0, 1], [0, 1]], [[2, 3, 4, 5, 6], []], [[7, 8, 9], [2, 3]]]


def _run(parts, folder, *mistakes):
    script = folder / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(parts), str(folder), *mistakes],
        capture_output=True,
        text=True,
        timeout=1_800,  # processes that wait for each other forever are a failure
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return _run(TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three_processes(tmp_path_factory):
    return _run(THREE, tmp_path_factory.mktemp("three"))


def _assert_same(results, term):
    together, alone = results["together"][term], results["alone"][term]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6, abs=1e-6)
    largest = max(abs(value) for value in alone["gradient"])
    assert largest > 1e-4
    assert together["gradient"] == pytest.approx(alone["gradient"], rel=1e-5, abs=1e-5 * largest)


@pytest.mark.parametrize("term", TERMS)
def test_two_processes_give_the_loss_and_gradient_of_one_with_all_rows(two_processes, term):
    _assert_same(two_processes, term)


@pytest.mark.slow
@pytest.mark.parametrize("term", TERMS)
def test_three_processes_give_the_loss_and_gradient_of_one_with_all_rows(three_processes, term):
    _assert_same(three_processes, term)


def test_repeated_texts_on_other_processes_are_masked(two_processes):
    together = two_processes["together"]
    assert together["info_ids"]["loss"] < together["info"]["loss"] - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "terms"),
    [
        ("discard_the_sum", {"sigreg", "covariance", "total"}),
        ("keep_the_own_gradient", {"sigreg", "covariance", "total"}),
        ("gather_without_gradient", {*CONTRASTIVE, "total"}),
        ("average_the_own_rows", {*CONTRASTIVE, "mse", "cosine", "total"}),
    ],
)
def test_known_mistakes_would_fail_these_tests(mistake, terms, tmp_path):
    results = _run(TWO, tmp_path, mistake)
    seen = set()
    for term in TERMS:
        try:
            _assert_same(results, term)
        except AssertionError:
            seen.add(term)
    assert seen == terms
