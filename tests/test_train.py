import dataclasses
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
import torch
from lightning_fabric.plugins.precision import Precision

from vaenb import checkpoints, data, gpu, likelihood, models, runs
from vaenb.config import Config, ConfigError, effective_beta, loss_of
from vaenb.muon import Muon, groups
from vaenb.train import TrainingDiverged, fit, fit_all, schedule

TINY = Config("digits", "dense", latents=8, epochs=2)
STEPS = 25  # of an epoch
# a process of its own, as a notebook is, killed at a step of training
SCRIPT = """
import os, signal, sys
from vaenb import train
from vaenb.config import Config

epochs, left = map(int, sys.argv[1:])
step = train.Progress.step

def counted(progress):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    step(progress)

train.Progress.step = counted
train.fit(Config("digits", "spatial", epochs=epochs))
"""


def launch(build, epochs, killed_at=0):
    environment = {**os.environ, "VAENB_BUILD": str(build), "VAENB_PROGRESS": "plain", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(epochs), str(killed_at)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def stored(build):
    (folder,) = (build / "runs").glob("digits-*")
    return folder, {name: runs.sha256(folder / name) for name in ("model.safetensors", "history.csv")}


def test_training_improves_the_bound_and_is_found_again():
    run = fit(TINY)
    untrained = TINY.build((1, 28, 28))
    before = sum(models.evaluate(untrained, run.images.test)).mean()
    after = sum(models.evaluate(run.model, run.images.test)).mean()
    assert after < before - 50
    assert run.history["epoch"] == [1, 2]
    assert run.history["test_rate"][-1] + run.history["test_distortion"][-1] == pytest.approx(after.item(), abs=1e-3)
    assert run.folder.stat().st_mtime_ns == fit(TINY).folder.stat().st_mtime_ns
    assert not run.model.training


def test_the_same_config_gives_the_same_bits_and_another_seed_does_not(monkeypatch, tmp_path):
    first = {n: runs.sha256(fit(TINY).folder / n) for n in ("model.safetensors", "history.csv")}
    other = fit(dataclasses.replace(TINY, seed=1))
    assert runs.sha256(other.folder / "model.safetensors") != first["model.safetensors"]
    torch.manual_seed(123)  # a caller's random state must not matter, nor be disturbed
    expected = torch.randn(3, generator=torch.Generator().manual_seed(123))
    monkeypatch.setenv("VAENB_BUILD", str(tmp_path / "elsewhere"))
    again = fit(TINY)
    assert {n: runs.sha256(again.folder / n) for n in first} == first
    assert torch.equal(torch.randn(3), expected)


def test_kill_in_mid_epoch_then_resume_equals_an_uninterrupted_run(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(whole, 6).wait(timeout=300) == 0
    for epochs_before_the_kill in (2, 1):  # and again after a resume
        process = launch(killed, 6, killed_at=epochs_before_the_kill * STEPS + STEPS // 2)
        assert process.communicate(timeout=300)[1].count("epoch ") == epochs_before_the_kill
        assert process.returncode == -signal.SIGKILL
        assert list((killed / "runs").glob("*.partial/checkpoint-*"))
        assert not list((killed / "runs").glob("*/SHA256SUMS"))
    last = launch(killed, 6)
    lines = last.communicate(timeout=300)[1]
    assert "epoch 1/6" not in lines
    assert "epoch 6/6" in lines
    assert stored(killed)[1] == stored(whole)[1]
    assert not list(stored(killed)[0].glob("checkpoint-*"))


def test_two_processes_that_want_the_same_run_train_it_once(tmp_path):
    first, second = launch(tmp_path, 40), None
    try:
        assert "epoch 1/40" in first.stderr.readline()
        first.send_signal(signal.SIGSTOP)  # so that the second one finds it at work, however fast it is
        second = launch(tmp_path, 40)
        assert "waiting for another process" in second.stderr.readline()
        first.send_signal(signal.SIGCONT)
        lines = "".join(process.communicate(timeout=300)[1] for process in (first, second))
        assert [process.returncode for process in (first, second)] == [0, 0]
        assert "epoch 1/40" not in lines
        assert lines.count("epoch 40/40") == 1
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait()


def test_a_damaged_run_is_set_aside_and_trained_again():
    folder = fit(TINY).folder
    good = runs.sha256(folder / "model.safetensors")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 8
    (folder / "model.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match="model.safetensors no longer matches its checksum"):
        assert runs.sha256(fit(TINY).folder / "model.safetensors") == good


@pytest.mark.parametrize("damage", [lambda c: c[:1000], lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: b"\xff" * 64])
def test_a_damaged_checkpoint_is_not_resumed_from(damage, monkeypatch):
    good = runs.sha256(fit(TINY).folder / "model.safetensors")
    config = dataclasses.replace(TINY, seed=7)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # interrupted in the second epoch's evaluation
        calls = iter([models.evaluate, stop])
        patch.setattr(models, "evaluate", lambda *a: next(calls)(*a))
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    (checkpoint,) = (runs.build_folder() / "runs").glob("*.partial/checkpoint-*")
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.warns(UserWarning, match="ignoring the damaged checkpoint"):
        resumed = fit(config)
    assert resumed.history["epoch"] == [1, 2]
    assert good != runs.sha256(resumed.folder / "model.safetensors")


def test_divergence_stops_with_step_and_config_and_keeps_the_checkpoint(monkeypatch):
    with pytest.raises(
        TrainingDiverged, match=r"loss .* at step \d+ of epoch 1.*no epoch was completed.*learning_rate=1e\+30"
    ):
        fit(dataclasses.replace(TINY, learning_rate=1e30))
    config, real, calls = dataclasses.replace(TINY, seed=3), models.VAE.forward, iter(range(1000))

    def poisoned(self, x, noise):  # NaN in the second epoch; the first has 25 steps and an evaluation in two parts
        rate, distortion = real(self, x, noise)
        return rate, distortion * (float("nan") if next(calls) == 31 else 1)

    monkeypatch.setattr(models.VAE, "forward", poisoned)
    with pytest.raises(TrainingDiverged, match=r"loss nan at step 5 of epoch 2: .*checkpoint after epoch 1 is kept in"):
        fit(config)
    assert list((runs.build_folder() / "runs").glob("*.partial/checkpoint-00001-*"))


def test_a_last_step_that_ruins_the_weights_is_not_stored(monkeypatch):
    def ruined(model, images):
        return torch.full((len(images),), float("nan")), torch.zeros(len(images))

    monkeypatch.setattr(models, "evaluate", ruined)
    with pytest.raises(TrainingDiverged, match="loss nan on the test images after epoch 1"):
        fit(dataclasses.replace(TINY, epochs=1))
    assert not list((runs.build_folder() / "runs").glob("*/model.safetensors"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"arm": "conv"}, "unknown arm 'conv': choose one of spatial, dense, mixed"),
        ({"rate_reduction": "max"}, "unknown rate_reduction 'max': choose one of sum, mean"),
        ({"epochs": 0}, "epochs=0: expected a whole number of at least 1"),
        ({"epochs": 1.5}, "expected a whole number"),
        ({"batch_size": "64"}, "expected a whole number"),
        ({"learning_rate": 0}, "expected a positive number"),
        ({"learning_rate": float("nan")}, "expected a positive number"),
        ({"latents": 20}, "latents=20 is for the dense arm"),
        ({"kernel_size": 4}, "odd"),
        ({"blocks": -1}, "at least 0"),
        ({"padding": "same"}, "choose one of zeros, circular"),
        ({"coordinates": "yes"}, "choose one of False, True"),
        ({"arm": "dense", "coordinates": True}, "the dense arm has none"),
        ({"reach": 1}, "for the mixed arm"),
        ({"arm": "mixed", "reach": -1}, "whole number"),
        ({"sides": "decoder"}, "for the mixed arm"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"seed": 2**32}, "expected a whole number from 0"),
        ({"hidden": 5}, "two whole numbers"),
        ({"learning_rate": "fast"}, "expected a positive number"),
        ({"arm": "mixed", "sides": "none"}, "choose one of both, encoder, decoder"),
        ({"padding": "circular", "kernel_size": 17}, "at most 15"),
    ],
)
def test_impossible_configs(bad, message):
    with pytest.raises(ConfigError, match=message):
        Config(**bad)


def test_unknown_map_size_and_data_set_leave_nothing_behind(build):
    with pytest.raises(ConfigError, match="latent_size=8: 28×28 images have maps of side 7, 14, 28"):
        fit(Config("digits", latent_size=8))
    with pytest.raises(data.DataError, match="unknown data set 'mnits'"):
        fit(Config("mnits"))
    assert not build.exists()


def test_schedule_rises_from_zero_and_falls_to_zero():
    values = [schedule(i / 1000) for i in range(1001)]
    assert values[0] == 0
    assert values[-1] == 0
    assert max(values) == pytest.approx(1)
    peak = values.index(max(values))
    assert all(a < b for a, b in pairwise(values[: peak + 1]))
    assert all(a > b for a, b in pairwise(values[peak:]))


@pytest.mark.parametrize("distortion", ["sum", "mean"])
@pytest.mark.parametrize("rate", ["sum", "mean"])
def test_every_scaling_is_a_multiple_of_a_beta_vae(distortion, rate):
    config = Config(distortion_reduction=distortion, rate_reduction=rate)
    r, d = torch.rand(8) * 30, torch.rand(8) * 100
    loss = loss_of(config, r, d, latents=49, pixels=784)
    factor = 1 / 784 if distortion == "mean" else 1
    beta = effective_beta(config, 49, 784)
    assert loss.item() == pytest.approx((factor * (d.mean() + beta * r.mean())).item(), rel=1e-5)
    assert beta == pytest.approx({"sumsum": 1, "meanmean": 16, "summean": 1 / 49, "meansum": 784}[distortion + rate])


def test_measurements_are_kept_and_depend_on_their_arguments(monkeypatch):
    run = fit(TINY)
    first = run.measure(likelihood.elbo, split="test")
    monkeypatch.setattr(models, "evaluate", None)
    monkeypatch.setattr(likelihood, "evaluate", None)
    assert run.measure(likelihood.elbo, split="test") == first
    with pytest.raises(TypeError):
        run.measure(likelihood.elbo, split="train")


def test_the_bound_of_a_run_is_that_of_its_model():
    run = fit(TINY)
    assert run.bound == pytest.approx(likelihood.elbo(run.model, run.images), rel=1e-12)


def test_fit_all_leaves_to_others_what_they_are_busy_with_and_collects_it_in_the_end(build):
    configs = [dataclasses.replace(TINY, epochs=1, seed=seed) for seed in range(2)]
    name = fit(configs[0]).folder.name
    (build / "runs" / name).rename(build / "parked")
    result = []
    with runs.exclusive(build / "runs" / ".locks" / f"{name}.lock"):
        thread = threading.Thread(target=lambda: result.extend(fit_all(configs)))
        thread.start()
        deadline = time.monotonic() + 120
        while len(list((build / "runs").glob("digits-*-s1-*/SHA256SUMS"))) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert thread.is_alive()
        (build / "parked").rename(build / "runs" / name)
    thread.join(timeout=120)
    assert [run.config for run in result] == configs


def test_what_is_in_the_store_is_read_and_drawn_without_loading_fabric():
    code = "import sys, vaenb.worth, vaenb.figures; sys.exit('lightning_fabric' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def checkpointed():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    return model, Muon(groups(model), 0.1), Precision()


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, monkeypatch):
    parts = checkpointed()
    checkpoints.save(tmp_path, *parts, [[1.0]])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(runs.DiskFull):
            checkpoints.save(tmp_path, *parts, [[1.0], [2.0]])
    assert checkpoints.restore(checkpoints.newest(tmp_path), *parts) == [[1.0]]


def test_of_two_checkpoints_the_newer_one_is_resumed_from(tmp_path):
    parts = checkpointed()
    for epoch in (1, 2):  # a kill after the second was written, and before the first was dropped
        checkpoints.save(tmp_path / str(epoch), *parts, [[1.0]] * epoch)
        shutil.copytree(tmp_path / str(epoch), tmp_path / "both", dirs_exist_ok=True)
    assert len(checkpoints.restore(checkpoints.newest(tmp_path / "both"), *parts)) == 2


def test_every_epoch_and_every_seed_has_random_numbers_of_its_own(monkeypatch):
    seen, observed = [], models.VAE.observed

    def watched(model, images, uniform):
        if torch.is_grad_enabled():  # not in evaluation, which is always the same
            seen.append(uniform.flatten()[0].item())
        return observed(model, images, uniform)

    monkeypatch.setattr(models.VAE, "observed", watched)
    for seed in (0, 1):
        fit(dataclasses.replace(TINY, seed=seed))
    assert len(seen) == len(set(seen)) == 2 * 2 * math.ceil(len(data.load("digits").train) / TINY.batch_size)


def test_the_learning_rate_rises_and_falls_once_over_all_epochs(monkeypatch):
    rates, real = [], gpu.set_learning_rate
    monkeypatch.setattr(gpu, "set_learning_rate", lambda group, rate: rates.append(rate) or real(group, rate))
    fit(TINY)
    steps = 2 * math.ceil(len(data.load("digits").train) / TINY.batch_size)
    expected = [TINY.learning_rate * schedule(step / steps) for step in range(steps)]
    assert rates[:: len(rates) // steps] == pytest.approx(expected)


def test_training_values_are_means_over_images():
    run = fit(dataclasses.replace(TINY, epochs=1, batch_size=1000, learning_rate=1e-9))  # two batches, of which one is small
    rate, distortion = models.evaluate(run.model, run.images.train)
    assert run.history["rate"][0] == pytest.approx(rate.mean().item(), rel=0.05)
    assert run.history["distortion"][0] == pytest.approx(distortion.mean().item(), rel=0.01)
