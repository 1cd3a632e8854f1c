import pytest
import torch
from torch import nn

from vaenb.models import VAE
from vaenb.muon import BETAS, DAMPING, MOMENTUM, SIZE, Muon, groups, orthogonalised
from vaenb.priors import Prior


@pytest.mark.parametrize("shape", [(4, 4), (3, 40), (40, 3), (1, 7), (32, 288), (64, 40)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -3, len(right))
    inside = left.T @ orthogonalised((left @ torch.diag(values) @ right)[None])[0] @ right.T
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), atol=1e-3, rtol=0)
    damped = values / (values**2 + DAMPING * (values**2).sum()).sqrt()
    assert (inside.diagonal() / damped).min() > 0.65
    assert (inside.diagonal() / damped).max() < 1.25


def test_what_is_orthogonal_does_not_depend_on_scale_and_zero_stays_zero():
    torch.manual_seed(0)
    matrix = torch.randn(8, 20)
    small, large, zero = orthogonalised(torch.stack([1e-6 * matrix, 1e6 * matrix, 0 * matrix]))
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4)
    assert torch.equal(zero, 0 * matrix)


def test_matrices_of_one_shape_take_together_the_steps_that_each_takes_alone():
    torch.manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10), (6, 5, 1, 2), (4, 4)]  # (6, 5, 1, 2) is (6, 10), too
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(weight.detach().clone()) for weight in together]
    share = {"share": 0.25, "matrices": True}  # of the first, whose steps are half as large as those of its shape
    shared = Muon([{"params": together[1:], "matrices": True}, {"params": together[:1], **share}], 0.1)
    own = [Muon([{"params": [weight], "matrices": True, **(share if weight is alone[0] else {})}], 0.1) for weight in alone]
    for _ in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimiser in (shared, *own):
            optimiser.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_steps_of_matrices_have_one_size_whatever_their_shape_and_gradient():
    torch.manual_seed(0)
    for shape, scale in [((16, 8, 3, 3), 1e-4), ((40, 100), 1e3)]:
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = scale * torch.randn(shape)
        Muon([{"params": [weight], "matrices": True}], lr=0.01).step()
        size = weight.detach().square().mean().sqrt() / 0.01
        assert size.item() == pytest.approx(SIZE, rel=0.2)
        assert (weight * weight.grad).sum() < 0  # downhill


def test_what_is_no_matrix_takes_the_steps_of_adam():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.arange(5.0)) for _ in range(2))
    weight = nn.Parameter(torch.eye(3))
    muon, adam = (
        Muon([{"params": [weight], "matrices": True}, {"params": [ours]}], 0.1),
        torch.optim.Adam([theirs], 0.1, BETAS),
    )
    for _ in range(5):
        ours.grad, weight.grad = torch.randn(5), torch.randn(3, 3)
        theirs.grad = ours.grad.clone()
        gradient = weight.grad
        for optimiser in (muon, adam):
            optimiser.step()
        assert weight.grad is gradient  # gradients stay for whoever looks at them
    torch.testing.assert_close(ours, theirs)


def test_matrices_are_the_weights_that_mix_channels():
    model, prior = VAE("mixed", (1, 28, 28), blocks=1), Prior((1, 7, 7))
    prior.means = nn.Parameter(torch.zeros(5, 49))
    matrices, rest = groups(model, prior)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert matrices["matrices"]
    assert "matrices" not in rest
    named = {names[id(parameter)] for parameter in matrices["params"]}
    assert {"encoder.2.weight", "to_latent.0.weight", "to_latent.1.weight", "decoder.0.across.0.weight"} <= named
    assert not named & {
        "encoder.0.weight",
        "from_latent.1.weight",
        "decoder.0.within.weight",
        "encoder.2.bias",
    }
    assert any(parameter is prior.means for parameter in rest["params"])
    assert len(matrices["params"]) + len(rest["params"]) == len(names) + 1


@pytest.mark.parametrize("reach", [0, 1, 3, None])
def test_weights_in_use_move_alike_whatever_the_reach(reach):
    torch.manual_seed(0)
    model = VAE("mixed", (1, 28, 28), reach=reach)
    layer = model.to_latent[1]
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(49, 49) * layer.near
    Muon(groups(model), lr=0.01).step()
    moved = (layer.weight.detach() - before)[layer.near.bool()] / 0.01
    assert moved.square().mean().sqrt().item() == pytest.approx(0.8 * SIZE, rel=0.3)


def test_large_matrices_are_left_to_adam():
    model = VAE("dense", (1, 28, 28), latents=300)
    assert [p.shape for p in model.parameters() if p.ndim == 2] == [(600, 1568), (1568, 300)]
    assert all(p.ndim == 4 for p in groups(model)[0]["params"])


def test_steps_are_those_of_momentum_whose_singular_values_are_made_alike():
    """Against a singular value decomposition, for gradients that change and span three orders of magnitude."""
    torch.manual_seed(0)
    weight, momentum = nn.Parameter(torch.zeros(6, 20)), torch.zeros(6, 20)
    optimiser = Muon([{"params": [weight], "matrices": True}], lr=1.0)
    optimiser.param_groups[0]["lr"] = 0.1
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.diag(torch.logspace(0, -3, 6)) @ torch.randn(6, 20)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad
        left, values, right = torch.linalg.svd(weight.grad + MOMENTUM * (momentum - weight.grad), full_matrices=False)
        damped = values / (values**2 + DAMPING * (values**2).sum()).sqrt()
        optimiser.step()
        step = left.T @ (before - weight.detach()) @ right.T / (0.1 * SIZE * 20**0.5)
        torch.testing.assert_close(step, torch.diag(step.diagonal()), atol=2e-3, rtol=0)
        assert (step.diagonal() / damped).min() > 0.65
        assert (step.diagonal() / damped).max() < 1.25


def test_vanishing_gradients_move_nothing_far():
    for scale in (1e-20, 1e-30, 1e-40):
        assert orthogonalised(scale * torch.randn(1, 8, 20)).abs().max() < 2
