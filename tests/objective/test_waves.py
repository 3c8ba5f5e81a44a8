"""Sums of waves: values by hand, the direct sum, gradients, vmap."""

import math

import pytest
import torch

from ragcun_hf.objective.isotropy import wave_sums, wave_sums_by_definition

of_both_devices = pytest.mark.parametrize("sums_of", [wave_sums, wave_sums_by_definition])  # a card uses the second
FREQUENCIES = {"spacing": 3 / 16, "num_frequencies": 17}


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _direct(x, spacing, num_frequencies):
    angles = x.unsqueeze(-1) * spacing * torch.arange(num_frequencies)
    return torch.stack([angles.cos().sum(0), angles.sin().sum(0)])


@of_both_devices
def test_sums_of_a_case_done_by_hand(sums_of):
    x = torch.tensor([[0.0], [math.pi / 2]])
    cosines, sines = sums_of(x, spacing=1.0, num_frequencies=4)
    assert cosines.flatten().tolist() == pytest.approx([2.0, 1.0, 0.0, 1.0], abs=1e-6)
    assert sines.flatten().tolist() == pytest.approx([0.0, 1.0, 0.0, -1.0], abs=1e-6)


@of_both_devices
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_sums_and_gradients_equal_those_of_the_direct_sum(sums_of, scale):
    x, weights = scale * _random(64, 9), _random(2, 9, 17, seed=1)
    gradients = []
    for function in (sums_of, _direct):
        given = x.clone().requires_grad_()
        sums = function(given, **FREQUENCIES)
        (sums * weights).sum().backward()
        gradients.append(given.grad)
    expected = _direct(x.double(), **FREQUENCIES).float()
    torch.testing.assert_close(sums_of(x, **FREQUENCIES), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)
    assert gradients[0].abs().min() > 0


def test_the_gradient_equals_finite_differences():
    x = _random(5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: wave_sums(given, **FREQUENCIES), (x,))


@of_both_devices
def test_sums_under_vmap_equal_those_one_by_one(sums_of):
    xs = _random(4, 12, 5)

    def value(x):
        return sums_of(x, **FREQUENCIES).square().sum()

    together = torch.func.vmap(torch.func.grad_and_value(value))(xs)
    alone = [torch.func.grad_and_value(value)(x) for x in xs]
    for number, (gradient, loss) in enumerate(alone):
        # Rounding may differ, on gradients of up to 50.
        torch.testing.assert_close(together[0][number], gradient, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(together[1][number], loss, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("shape", "num_frequencies"), [((4,), 3), ((2, 3, 4), 3), ((4, 2), 1)])
def test_other_shapes_and_a_single_frequency_are_refused(shape, num_frequencies):
    with pytest.raises(ValueError, match="needs x of shape"):
        wave_sums(torch.zeros(shape), spacing=1.0, num_frequencies=num_frequencies)
