"""Our priors beside the samplers of pythae 0.1.2 (Chadebec et al. 2022): ``make bench``.

Encoder and decoder are our FCNN-VAE with a 7×7 map, trained by pythae on MNIST. Then pythae's samplers and our priors are
fitted to the latents of that one model, one after the other on the same threads, and measured in the same way. pythae's
VAMP sampler needs a model of its own, trained for as many epochs; its fit is that training. One run, one seed.

What one has to know of pythae: latents are flat vectors; ``bce`` takes probabilities; a flow without a training
configuration trains for 100 epochs; VAMPSampler draws its pseudo-inputs in order, as many times as they fit, and with
the tanh of the log variances that training used as they are, so the model is also drawn from as it was trained.
"""

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pythae import models as pythae_models
from pythae import samplers as pythae_samplers
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.pipelines import TrainingPipeline
from pythae.trainers import BaseTrainerConfig
from torch import Tensor

from vaenb import data, figures
from vaenb.autoregressive import Autoregressive
from vaenb.classifier import classifier, extract
from vaenb.config import Config
from vaenb.gaussians import FullGaussian, Mixture, PositionGaussian
from vaenb.models import VAE
from vaenb.priors import Prior, StandardNormal
from vaenb.quality import compare, frechet_distance
from vaenb.samples import COUNT, decoded, halves, known_features
from vaenb.two_stage import TwoStage, Vamp

COMPONENTS = (10, 150)  # of pythae's GaussianMixture: its default, and as many as ours
SAMPLERS = {
    "Normal": ("Normal", {}),
    **{f"GaussianMixture of {n}": ("GaussianMixture", {"n_components": n}) for n in COMPONENTS},
    **{name: (name, {}) for name in ("MAF", "IAF", "TwoStageVAE")},  # as they come
}


class Encoder(BaseEncoder):
    """Ours, with flat latents."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> ModelOutput:
        """(N, 1, 28, 28) -> means and log variances, (N, d) each."""
        q = self.vae.encode(x)
        return ModelOutput(embedding=q.mean.flatten(1), log_covariance=2 * q.base_dist.scale.log().flatten(1))


class Decoder(BaseDecoder):
    """Ours, from flat latents to probabilities."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> ModelOutput:
        """(N, d) -> (N, 1, 28, 28) in [0, 1]."""
        return ModelOutput(reconstruction=self.vae.decode(z.view(len(z), *self.vae.latent_shape)).mean)


def trainer(folder: Path, epochs: int, batch_size: int, learning_rate: float) -> BaseTrainerConfig:
    """A configuration of pythae's trainer."""
    return BaseTrainerConfig(
        output_dir=str(folder),
        num_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        no_cuda=True,
    )


def trained(kind: str, grey: Tensor, epochs: int, folder: Path, **options: Any) -> tuple[Any, VAE, float]:
    """A pythae model around a new VAE of ours, trained by pythae; and the seconds that took."""
    vae = Config("mnist").build((1, 28, 28))
    config = getattr(pythae_models, f"{kind}Config")(
        input_dim=(1, 28, 28), latent_dim=49, reconstruction_loss="bce", **options
    )
    model = getattr(pythae_models, kind)(config, encoder=Encoder(vae), decoder=Decoder(vae))
    started = time.perf_counter()
    TrainingPipeline(model=model, training_config=trainer(folder, epochs, 64, 2e-3))(train_data=grey)
    seconds = time.perf_counter() - started
    return model.eval().requires_grad_(False), vae.eval().requires_grad_(False), seconds


@torch.no_grad()
def latents(vae: VAE, grey: Tensor, seed: int) -> Tensor:
    """One draw z ~ q(z|x) for each grey image, (N, 1, 7, 7): what pythae fits its samplers to."""
    torch.manual_seed(seed)
    return torch.cat([vae.encode(part).sample() for part in grey.split(500)])


def log_density(kind: str, sampler: Any, z: Tensor) -> float | None:
    """Mean log r(z) in nats where a pythae sampler has a density."""
    flat = z.flatten(1)
    if kind == "GaussianMixture":
        return float(sampler.gmm.score_samples(flat.numpy()).mean())
    if kind in ("MAF", "IAF"):
        flow = sampler.maf_model if kind == "MAF" else sampler.iaf_model
        with torch.no_grad():
            out = flow.eval()(flat)
        return (sampler.prior.log_prob(out.out) + out.log_abs_det_jac).mean().item()
    return None


@torch.no_grad()
def as_trained(vamp: Any) -> Tensor:
    """``COUNT`` pictures from pythae's VAMP model with the posteriors of the pseudo-inputs that its loss has."""
    inputs = vamp.pseudo_inputs(vamp.idle_input).reshape(-1, 1, 28, 28)
    chosen = vamp.encoder(inputs[torch.arange(COUNT) % len(inputs)])
    z = chosen.embedding + (0.5 * chosen.log_covariance).exp() * torch.randn_like(chosen.embedding)
    return vamp.decoder(z).reconstruction


def benchmark(epochs: int, sampler_epochs: int, count: int) -> list[dict[str, Any]]:
    """A row for each sampler: whose, its name, seconds of fitting and of sampling, nats gained, distances."""
    images = data.load("mnist")
    grey, others = images.train.float() / 255, halves(images)[0].float() / 255
    network, known = classifier("mnist"), known_features("mnist")
    folder = Path(tempfile.mkdtemp())
    model, vae, training = trained("VAE", grey, epochs, folder)
    print(f"pythae trained the VAE in {training:.0f} s", flush=True)
    own = extract(network, decoded(vae, latents(vae, images.test.float() / 255, 1)))[0]
    held_out = latents(vae, images.test.float() / 255, 2)
    normal = StandardNormal((1, 7, 7)).log_prob(held_out).mean().item()
    rows = []

    def measure(
        whose: str,
        name: str,
        fit: float,
        draw: Callable[[], Tensor],
        nats: float | None = None,
        vae: float = training,
    ) -> None:
        started = time.perf_counter()
        pictures = draw()
        drawing = time.perf_counter() - started
        features = extract(network, pictures.clamp(0, 1))
        statistics = compare(features, known)
        rows.append({
            "whose": whose, "name": name, "fit_seconds": fit, "seconds": fit + vae, "sample_seconds": drawing,
            "nats_gained": None if nats is None else nats - normal,
            "to_reconstructions": frechet_distance(features[0], own), "to_data": statistics["frechet"],
            "density": statistics["density"], "coverage": statistics["coverage"],
        })  # fmt: skip
        print(rows[-1], flush=True)

    measure("", "reconstructions", 0.0, lambda: decoded(vae, latents(vae, others, 3)))
    for name, (kind, settings) in SAMPLERS.items():
        options = getattr(pythae_samplers, f"{kind}SamplerConfig")(**settings)
        sampler = getattr(pythae_samplers, f"{kind}Sampler")(model, options)
        started = time.perf_counter()
        if kind == "GaussianMixture":
            sampler.fit(grey)
        elif kind != "Normal":
            sampler.fit(grey, training_config=trainer(folder, sampler_epochs, 100, 1e-3))
        fit = time.perf_counter() - started if kind != "Normal" else 0.0
        nats = normal if kind == "Normal" else log_density(kind, sampler, held_out)
        measure("pythae", name, fit, lambda sampler=sampler: sampler.sample(COUNT, batch_size=500).detach(), nats)
    vamp, _, seconds = trained("VAMP", grey, epochs, folder, number_components=500)
    sampler = pythae_samplers.VAMPSampler(vamp)
    more = {"fit": 0.0, "vae": seconds}
    measure("pythae", "VAMP", draw=lambda: sampler.sample(COUNT, batch_size=500).detach(), **more)
    measure("pythae", "VAMP, drawn as trained", draw=lambda: as_trained(vamp), **more)

    ours: dict[str, Callable[[], Prior]] = {
        "N(0, I)": lambda: StandardNormal((1, 7, 7)),
        "per position": lambda: PositionGaussian((1, 7, 7)),
        "full Gaussian": lambda: FullGaussian((1, 7, 7)),
        "mixture of 30": lambda: Mixture((1, 7, 7), 30),
        "mixture of 150": lambda: Mixture((1, 7, 7), 150),
        "two-stage VAE": lambda: TwoStage((1, 7, 7), epochs=3),
        "VampPrior": lambda: Vamp(vae, 500, batch_size=512, learning_rate=0.1),
        "autoregressive": lambda: Autoregressive((1, 7, 7), position_aware=True, learning_rate=4e-3),
    }
    for name, make in ours.items():
        torch.manual_seed(0)
        started = time.perf_counter()
        prior = make().to(memory_format=torch.channels_last)  # as in ladder.build
        if name != "N(0, I)":  # pythae's clock, too, includes encoding the images
            prior.fit(torch.cat([latents(vae, grey, 4 + i) for i in range(-(-count // len(grey)))])[:count])
        fit = time.perf_counter() - started if name != "N(0, I)" else 0.0
        nats = prior.log_prob(held_out).mean().item()
        measure("ours", name, fit, lambda prior=prior: decoded(vae, prior.sample(COUNT, seed=5)), nats)
    shutil.rmtree(folder)
    return rows


def show(rows: list[dict[str, Any]], epochs: int, sampler_epochs: int) -> None:
    """Save the figure of what ``benchmark`` measured with these epochs."""
    shown = sorted(rows[1:], key=lambda row: (row["whose"], -row["to_reconstructions"]))
    names = {id(row): f"{row['whose']}: {row['name']}" for row in shown}
    panels = {
        title: {names[id(row)]: [row[column]] for row in shown}
        for title, column in {
            "Fréchet distance to reconstructions": "to_reconstructions",
            "seconds to train model and prior": "seconds",
        }.items()
    }
    last = {row["whose"]: row for row in shown}  # the nearest
    ours, theirs = (f"{last[w]['to_reconstructions']:.1f}, in {last[w]['seconds']:.0f} seconds" for w in ("ours", "pythae"))
    title = f"Nearest to reconstructions: ours {ours}; pythae's {theirs}"
    colours = {names[id(row)]: figures.PALETTE[0 if row["whose"] == "pythae" else 1] for row in shown}
    figures.save(
        figures.seed_points(panels, colours, title, unit=""),
        "bench_samplers",
        "mnist",
        numbers={"rows": rows, "threads": torch.get_num_threads()},
        alt="Fréchet distance to reconstructions, and seconds to train model and prior, for the samplers of pythae and for "
        "our priors, on the latents of one model.",
        note=f"FCNN-VAE, 7×7 map, trained by pythae 0.1.2 ({epochs} epochs). One run, one seed, "
        f"{torch.get_num_threads()} threads; {COUNT:,} samples; floor of the distance (reconstructions of other images): "
        f"{rows[0]['to_reconstructions']:.1f}. pythae: flows and second VAE {sampler_epochs} epochs; its "
        f"GaussianMixture has {COMPONENTS[0]} components unless told otherwise; VAMP is trained as a model of its own; its "
        "distance is to the reconstructions of the other model.",
    )


def main() -> None:
    """Run, print for each of pythae's samplers the best of ours that takes no longer, and save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=4, help="of the VAEs (default: 4)")
    parser.add_argument("--sampler-epochs", type=int, default=3, help="of pythae's flows and second VAE (default: 3)")
    parser.add_argument("--count", type=int, default=120_000, help="latents for our priors (default: 120,000)")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    rows = benchmark(options.epochs, options.sampler_epochs, options.count)
    show(rows, options.epochs, options.sampler_epochs)
    for theirs in (row for row in rows if row["whose"] == "pythae"):
        within = [row for row in rows if row["whose"] == "ours" and row["seconds"] <= theirs["seconds"]]
        best = min(within, key=lambda row: row["to_reconstructions"], default=None)
        ours = f"{best['name']}, {best['to_reconstructions']:.1f} in {best['seconds']:.0f} s" if best else "nothing"
        print(f"{theirs['name']}: {theirs['to_reconstructions']:.1f} in {theirs['seconds']:.0f} s; ours within: {ours}")


if __name__ == "__main__":
    main()
