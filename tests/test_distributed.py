import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed
from lightning_fabric.plugins.precision import MixedPrecision
from PIL import Image

from vaenb import bundle, checkpoints, models, processes, runs
from vaenb.config import Config, ConfigError
from vaenb.muon import Muon, groups
from vaenb.train import fit

# 1,597 images: the last batch has 61, an odd number. At this size the default learning rate is rough on the FC-VAE, and lets
# rounding grow; maps are trained at that rate below.
TINY = Config("digits", "dense", latents=8, epochs=3, learning_rate=5e-4)
SCRIPT = """
import datetime, os, sys
from vaenb import processes
from vaenb.config import Config
from vaenb.train import fit

def say(text):
    sys.stdout.write(text + "\\n")  # in one piece: the other process writes as well
    sys.stdout.flush()

processes.TIMEOUT = datetime.timedelta(seconds=float(os.environ.get("TIMEOUT", 60)))
say(f"process {os.environ['RANK']} {os.getpid()}")
for argument in sys.argv[1:]:
    try:
        run = fit(eval(argument))
        say(f"finished {run.config.seed} {len(run.history['epoch'])} {run.model.training}")
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        if isinstance(error, processes.ProcessLost):
            sys.exit(3)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(build, **more):
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "VAENB_BUILD": str(build), "VAENB_PROGRESS": "plain", "CUDA_VISIBLE_DEVICES": "", **more}


def start(command, build, tmp_path, *configs, **more):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [*command, str(script), *map(repr, configs)]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(build, **more)
    )


def torchrun():
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


def fabric_run():
    where = ["--main-address=127.0.0.1", f"--main-port={free_port()}"]
    return [sys.executable, "-m", "lightning_fabric.cli", "--accelerator=cpu", "--devices=2", *where]


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} is not in {''.join(lines)}")


def weights(run):
    return safetensors.torch.load_file(run.folder / "model.safetensors")


def check_same(run, expected, weights_within=1e-5):
    for column, values in expected.history.items():
        assert run.history[column] == pytest.approx(values, rel=1e-5)
    for name, tensor in weights(expected).items():
        difference = (weights(run)[name] - tensor).norm() / tensor.norm()
        assert difference < weights_within, name


def interrupt(config, monkeypatch):
    """Leave the checkpoint of the first epoch."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        calls = iter([models.evaluate, stop])
        patch.setattr(models, "evaluate", lambda *a: next(calls)(*a))
        with pytest.raises(KeyboardInterrupt):
            fit(config)


def test_two_processes_train_the_curve_of_one_from_nothing_and_from_its_checkpoint(tmp_path, monkeypatch):
    resumed = dataclasses.replace(TINY, seed=1, batch_size=84)  # the last batch has one image, for two processes
    tiny_batch = dataclasses.replace(TINY, batch_size=1)
    default = Config("digits", epochs=3, seed=2)
    alone = [fit(TINY), fit(resumed), fit(default)]
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("VAENB_BUILD", str(tmp_path / "together"))
    interrupt(resumed, monkeypatch)
    job = start(fabric_run(), tmp_path / "together", tmp_path, tiny_batch, TINY, resumed, default)
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 0, output
    assert output.count("ConfigError: 2 processes share batches of 1") == 2
    assert output.count("finished 0 3 False") == output.count("finished 1 3 False") == 2, output
    assert output.count("epoch 1/3") == 2  # one process shows it, and the second of three runs goes on from its checkpoint
    assert output.count("epoch 2/3") == 3
    found = [path for path in (tmp_path / "together" / "runs").iterdir() if not path.name.startswith(".")]
    assert len(found) == 3
    for run, expected in zip([fit(TINY), fit(resumed), fit(default)], alone, strict=True):
        assert run.folder in found
        assert runs.read(run.folder)["summary"]["processes"] == 2
        check_same(run, expected, weights_within=1e-4 if expected is alone[2] else 1e-5)  # steps are longer


def test_the_command_line_in_two_processes_writes_one_model(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "my archive").mkdir()
    for index in range(12):
        picture = generator.integers(256, size=(70, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "my archive" / f"{index}.png")
    command = [*torchrun(), "-m", "vaenb", "train", f"folder:{tmp_path / 'my archive'}", "--epochs", "1"]
    job = subprocess.run(
        [*command, "--out", str(tmp_path / "model")],
        env=environment(tmp_path / "build"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("a VAE and its prior, ready") == 1
    assert bundle.load(tmp_path / "model").model.image_shape == (3, 64, 64)
    (run,) = (tmp_path / "build" / "runs").glob("folder-my-archive-spatial-*-s0-????????????????")
    assert runs.read(run)["summary"]["processes"] == 2


def test_a_killed_process_ends_the_job_and_one_process_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, epochs=12)
    alone = fit(config)
    job = start(torchrun(), tmp_path / "killed", tmp_path, config)
    lines = read_until(job, "epoch 2/12")
    (victim,) = [int(line.split()[2]) for line in lines if line.startswith("process 1 ")]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    output = "".join(lines) + job.communicate(timeout=60)[0]
    assert time.monotonic() - killed < 40
    assert job.returncode != 0
    assert "finished" not in output
    assert list((tmp_path / "killed" / "runs").glob("*.partial/checkpoint-*"))
    assert not list((tmp_path / "killed" / "runs").glob("*/SHA256SUMS"))
    monkeypatch.setenv("VAENB_BUILD", str(tmp_path / "killed"))
    run = fit(config)
    assert runs.read(run.folder)["summary"]["processes"] == 1
    check_same(run, alone)


def test_a_process_that_hangs_is_not_waited_for_for_ever(tmp_path):
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "by-hand"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TIMEOUT": "20"}  # also for one to start
    config = dataclasses.replace(TINY, epochs=500)
    first, second = (
        start([sys.executable], tmp_path / "hangs", tmp_path, config, RANK=rank, LOCAL_RANK=rank, **common)
        for rank in ("0", "1")
    )
    try:
        read_until(first, "epoch 2/500")
        second.send_signal(signal.SIGSTOP)
        output = first.communicate(timeout=120)[0]
        assert first.returncode == 3, output
        assert "ProcessLost: process 0 of 2 stops: another one has stopped, or did not answer for 0:00:20" in output
        assert "run the same command again" in output
    finally:
        second.kill()
        second.wait()
        first.kill()


@pytest.mark.parametrize(
    ("says", "becomes"),
    [
        ("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer", processes.ProcessLost),
        ("Application timeout caused pair closure", processes.ProcessLost),  # that of another operation
        ("mat1 and mat2 shapes cannot be multiplied", RuntimeError),
    ],
)
def test_only_broken_connections_become_a_lost_process(monkeypatch, says, becomes):
    monkeypatch.setattr(processes, "LET_GO", 0.0)
    with pytest.raises(RuntimeError) as raised, processes._watching():
        raise RuntimeError(says)
    assert raised.type is becomes


def test_what_gloo_still_holds_when_a_process_is_lost_does_not_abort_the_other(tmp_path):
    script = tmp_path / "leaves.py"
    script.write_text(f"""
import datetime, os, sys, time
import torch, torch.distributed as dist
from vaenb import processes

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
group = dist.new_group(timeout=datetime.timedelta(seconds=10))  # as long as one waits for the other, once both are there
if rank == 1:
    time.sleep(60)

class Late:
    def __del__(self, sleep=time.sleep):  # an interpreter that takes its time to end
        sleep(2)

late = Late()
try:
    with processes._watching():
        first = dist.all_reduce(torch.ones(10), group=group, async_op=True)
        for _ in range(5000):
            dist.all_reduce(torch.ones(10), group=group, async_op=True)
        first.wait()
except processes.ProcessLost:
    sys.exit(3)
""")
    first, second = (
        subprocess.Popen([sys.executable, str(script)], env=environment(tmp_path, RANK=rank), stderr=subprocess.PIPE)
        for rank in ("0", "1")
    )
    try:
        output = first.communicate(timeout=60)[1]
        assert first.returncode == 3, output
    finally:
        second.kill()
        second.communicate()


def test_mixed_precision_is_near_full_precision_and_another_run(monkeypatch):
    config = dataclasses.replace(TINY, epochs=1)
    full, mixed = fit(config), fit(dataclasses.replace(config, precision="bf16-mixed"))
    assert mixed.folder != full.folder
    assert "bf16-mixed" in mixed.folder.name
    assert weights(mixed).keys() == weights(full).keys()
    assert all(tensor.dtype == torch.float32 for tensor in weights(mixed).values())
    assert mixed.history["test_distortion"] != full.history["test_distortion"]
    assert mixed.history["test_distortion"] == pytest.approx(full.history["test_distortion"], rel=0.05)


def test_decoder_and_encoder_put_out_single_precision_where_layers_compute_in_16_bits():
    model = Config("photos", latent_size=16, likelihood="logistic").build((3, 64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = model.encode(torch.rand(2, 3, 64, 64))
        assert q.mean.dtype == torch.float32
        assert model.decode(q.mean).mean.dtype == torch.float32


def test_precisions_that_cannot_be(monkeypatch):
    with pytest.raises(ConfigError, match="unknown precision 'half': choose one of 32-true, bf16-mixed, 16-mixed"):
        Config(precision="half")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU"):
        fit(dataclasses.replace(TINY, precision="16-mixed"))


def test_shares_are_the_batch_in_order_and_nearly_equal(monkeypatch):
    batch = torch.arange(61)
    assert torch.equal(processes.share(batch), batch)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    parts = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(processes.share(batch))
    assert torch.equal(torch.cat(parts), batch)
    assert {len(part) for part in parts} == {15, 16}


def test_a_checkpoint_keeps_the_scale_of_losses_in_16_bits(tmp_path):
    def parts(plain=False):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimiser = Muon(groups(model), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=not plain)
        return model, optimiser, MixedPrecision("16-mixed", device="cpu", scaler=scaler)

    (model, optimiser, precision), (plain, adam, unscaled) = parts(), parts(plain=True)
    for step in range(5):  # the second one overflows, and halves the scale
        for network, its, scaling in ((model, optimiser, precision), (plain, adam, unscaled)):
            if network is plain and step == 1:
                continue
            loss = network(torch.eye(3)[:2]).square().sum() * (float("inf") if step == 1 else 1)
            its.zero_grad()
            scaling.backward(loss, None)
            scaling.optimizer_step(its)
    torch.testing.assert_close(model.weight, plain.weight)
    torch.testing.assert_close(model.bias, plain.bias)
    checkpoints.save(tmp_path, model, optimiser, precision, [[1.0]])
    other, its, restored = parts()
    assert restored.state_dict() != precision.state_dict()
    assert checkpoints.restore(checkpoints.newest(tmp_path), other, its, restored) == [[1.0]]
    assert restored.state_dict() == precision.state_dict()
    assert torch.equal(other.weight, model.weight)
    for name in ("momentum", "step"):
        assert torch.equal(its.state[other.weight][name], optimiser.state[model.weight][name])
