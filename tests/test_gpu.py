"""Computing on a GPU. The tests that need one are skipped elsewhere."""

import copy

import pytest
import torch

from vaenb import dependence, gpu, joint, ladder, likelihood, muon, samples, worth
from vaenb.config import Config
from vaenb.train import fit

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ARMS = [
    {},
    {"arm": "dense", "latents": 5},
    {"arm": "mixed", "reach": 1},
    {"hidden": (24, 48), "blocks": 1, "padding": "circular"},
    {"likelihood": "logistic"},
    {"coordinates": True, "latent_size": 14},
]


@pytest.fixture
def steps(monkeypatch):
    """All that are made; ``record`` says whether they may be recorded."""

    class Steps(list):
        record = True

    made, make = Steps(), gpu.Step.__init__

    def noticed(self, *args, record=True):
        make(self, *args, record=record and made.record)
        made.append(self)

    monkeypatch.setattr(gpu.Step, "__init__", noticed)
    return made


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Call it to see no GPU from then on, and to forget what was computed on one."""

    def leave():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        worth._reconstructed.cache_clear()
        samples.known_features.cache_clear()

    return leave


def test_a_step_on_a_cpu_is_an_ordinary_call():
    weight = torch.zeros(3, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=1.0)

    def work(x):
        sgd.zero_grad()
        (weight * (x + gpu.drawn(lambda: torch.rand(3), x.device))).sum().backward()
        sgd.step()
        return x.sum()

    step = gpu.Step(work, sgd, torch.device("cpu"))
    torch.manual_seed(0)
    assert [step(torch.ones(3)).item() for _ in range(6)] == [3.0] * 6
    torch.manual_seed(0)
    assert torch.allclose(-weight, sum(1 + torch.rand(3) for _ in range(6)))
    assert isinstance(sgd.param_groups[0]["lr"], float)
    gpu.set_learning_rate(sgd.param_groups[0], 0.5)
    assert sgd.param_groups[0]["lr"] == 0.5


def test_there_is_here_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = torch.nn.Linear(2, 2)
    assert gpu.there(module) is module
    assert gpu.device() == torch.device("cpu")


@needs_gpu
def test_a_recorded_step_draws_anew_and_reads_the_learning_rate_of_the_moment():
    place = torch.device("cuda")
    weight = torch.zeros(3, requires_grad=True, device=place)
    adam = muon.Muon([weight], 1.0)
    seen = []

    def work(x):
        noise = gpu.drawn(lambda: torch.rand(3), place)
        adam.zero_grad()
        (weight * (x + noise)).sum().backward()
        adam.step()
        return torch.stack([x.sum(), noise.sum()])

    step = gpu.Step(work, adam, place)
    torch.manual_seed(0)
    for i in range(8):
        gpu.set_learning_rate(adam.param_groups[0], 1.0 if i < 6 else 0.0)
        before = weight.detach().clone()
        seen.append(step(torch.full((3,), float(i))).tolist())
        assert torch.equal(before, weight) == (i >= 6)
    torch.manual_seed(0)
    expected = [[3.0 * i, torch.rand(3).sum().item()] for i in range(8)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))
    assert step.graph is not None
    assert step(torch.ones(1))[0] == 1  # of another shape: not recorded


@needs_gpu
@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_recorded_training_is_ordinary_training(arm, monkeypatch, steps):
    config = Config("digits", epochs=1, batch_size=60, **arm)  # with a smaller last batch
    recorded = fit(config)
    monkeypatch.setenv("VAENB_BUILD", str(recorded.folder.parent.parent / "ordinary"))
    steps.record = False
    ordinary = fit(config)
    assert [step.graph is not None for step in steps] == [True, False]
    assert recorded.bound["negative_elbo"] == pytest.approx(ordinary.bound["negative_elbo"], rel=1e-3)
    for mine, theirs in zip(recorded.model.parameters(), ordinary.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


@needs_gpu
@pytest.mark.parametrize("rung", [rung for rung in ladder.RUNGS if rung not in ("N(0, I)", "per position")])
def test_priors_learn_and_measure_as_on_a_cpu(rung, on_the_cpu, steps):
    run = fit(Config("digits", epochs=3))
    repaired = ladder.repair(run, rung, 6_000)
    measured = {f: getattr(worth, f)(repaired) for f in ("nats", "prior_quality")}
    assert all(step.graph is not None for step in steps)
    on_the_cpu()
    again = {f: getattr(worth, f)(repaired) for f in ("nats", "prior_quality")}
    assert measured["nats"]["gain"] == pytest.approx(again["nats"]["gain"], abs=0.01)
    for name in ("frechet", "to_reconstructions", "nearest"):
        assert measured["prior_quality"][name] == pytest.approx(again["prior_quality"][name], rel=0.02)
    prior = ladder.build(rung, run.model, 6_000)
    prior.fit(ladder._draws(run.model, run.images.train, 6_000), seed=0)
    z = dependence.aggregate(run.model, run.images.test, 5)
    assert prior.log_prob(z).mean().item() == pytest.approx(repaired.prior.log_prob(z).mean().item(), abs=0.5)


@needs_gpu
def test_joint_training_is_the_same_as_on_a_cpu(on_the_cpu, steps):
    run = fit(Config("digits", epochs=3))
    repaired = ladder.repair(run, "mixture", 6_000)
    tuned = ladder.tune(repaired, epochs=2)
    assert all(step.graph is not None for step in steps)
    bounds, z = worth.bounds(tuned, subset=50), dependence.aggregate(tuned.run.model, run.images.test)
    pictures = samples.decoded(tuned.run.model, z)
    on_the_cpu()
    for name, value in worth.bounds(tuned, subset=50).items():
        assert value == pytest.approx(bounds[name], abs=0.02)
    torch.testing.assert_close(dependence.aggregate(tuned.run.model, run.images.test), z, rtol=0, atol=1e-3)
    torch.testing.assert_close(samples.decoded(tuned.run.model, z), pictures, rtol=0, atol=1e-3)
    model, prior = copy.deepcopy(run.model), copy.deepcopy(repaired.prior)
    joint.train_jointly(model, prior, run.images.train, 2, 8e-3, 0)
    expected = likelihood.elbo(model, run.images)["negative_elbo"]
    assert likelihood.elbo(tuned.run.model, run.images)["negative_elbo"] == pytest.approx(expected, abs=1.0)
