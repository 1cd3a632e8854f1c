"""Steps of training a second of many processes on one GPU: on cores alone, taking turns, at the same time, recorded.

    python tests/bench/gpu.py 16

Half of the processes train the narrow FCNN-VAE, half the deep one together with a mixture. With NVIDIA's Multi-Process
Service, ``nvidia-cuda-mps-control -d``, they compute at the same time: run it without and with that.
"""

import multiprocessing
import sys
import time
from multiprocessing.synchronize import Barrier

import torch

from vaenb import cpu, gpu, muon
from vaenb.config import Config
from vaenb.gaussians import Mixture
from vaenb.models import reparametrise

BATCH, SECONDS, WARM_UP = 64, 4.0, 10


def steps_a_second(deep: bool, place: str, record: bool, all_ready: Barrier) -> float:
    """Of one process, once all are ready."""
    trunks = {"hidden": (24, 48), "blocks": 3} if deep else {}
    model = Config("mnist", **trunks).build((1, 28, 28)).to(place)
    prior = Mixture(model.latent_shape, 300).to(place) if deep else None
    optimiser = muon.Muon(muon.groups(model, *[prior] * deep), 1e-3)

    def work(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        q = model.encode(x)
        z = reparametrise(q, noise)
        log_prior = model.prior().log_prob(z) if prior is None else -prior.negative_log_prob(z)
        loss = -(log_prior + model.decode(z).log_prob(x) + q.entropy()).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    take = gpu.Step(work, optimiser, torch.device(place), record)
    count, until = 0, float("inf")
    with cpu.one_thread():
        while time.perf_counter() < until:
            take(torch.rand(BATCH, 1, 28, 28).round(), torch.randn(BATCH, *model.latent_shape)).item()
            count += 1
            if count == WARM_UP:
                all_ready.wait()
                until = time.perf_counter() + SECONDS
    return (count - WARM_UP) / SECONDS


def measure(processes: int, place: str, record: bool) -> float:
    """Of all processes together."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        all_ready = manager.Barrier(processes)
        jobs = [(i % 2 == 1, place, record, all_ready) for i in range(processes)]
        return sum(pool.starmap(steps_a_second, jobs, chunksize=1))


if __name__ == "__main__":
    count = int(sys.argv[1])
    print(f"{count} processes, CPU: {measure(count, 'cpu', False):,.0f} steps a second", flush=True)
    if torch.cuda.is_available():
        for record in (False, True):
            kind = "recorded" if record else "not recorded"
            print(f"{count} processes, GPU, {kind}: {measure(count, 'cuda', record):,.0f} steps a second", flush=True)
