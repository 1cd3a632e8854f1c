import platform
import subprocess
import sys

import pytest
import torch

from vaenb import canvas
from vaenb.flows import FlowMatching
from vaenb.models import VAE, ImageSizeError
from vaenb.receptive import GlobalLayerError


def model_of(stride=4, kernel_size=3, **options):
    torch.manual_seed(0)
    options = {"latent_channels": 2, "likelihood": "logistic", **options}
    model = VAE("spatial", (3, 32, 32), stride, kernel_size=kernel_size, **options).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)  # no weight is zero, as those of new residual blocks are
    return model


@pytest.mark.parametrize("stride", [4, 2, 1])
@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 3}, {"kernel_size": 5}, {"blocks": 1}], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (61, 75), (4, 70)])
def test_tile_by_tile_equals_all_at_once(stride, options, size):
    model = model_of(stride, **options)
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    z = model.encode(image[None].double() / 255).mean[0]
    halo, _ = canvas.halos(model.float())
    bands = [range(y, min(y + 3, z.shape[1])) for y in range(0, z.shape[1], 3)]
    encode = [canvas.encode_rows(model, image, rows, halo, tile=5) for rows in bands]
    torch.testing.assert_close(torch.cat(encode, dim=1), z.float(), atol=1e-5, rtol=0)
    whole = model.decode(z[None].float(), size).mean[0]
    torch.testing.assert_close(
        torch.cat(list(canvas.render(model, z.float(), size, tile=3)), dim=1), whole, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(torch.cat(list(canvas.reconstruct(model, image, tile=4)), dim=1), whole, atol=1e-5, rtol=0)


def test_halos_of_models_that_see_far():
    near = canvas.halos(model_of())
    assert canvas.halos(model_of(blocks=40)) == tuple(halo + 40 for halo in near)  # a 3×3 convolution in each


def test_no_smaller_halo_would_do():
    """The overlap is what the receptive field demands, neither less nor more."""
    model = model_of()
    encoding, decoding = canvas.halos(model)
    z = torch.randn(1, 2, 15, 15)
    model = model.float()
    whole = model.decode(z, (60, 60)).mean[..., 28:32, 28:32]
    for halo in (decoding, decoding - 1):
        part = z[..., 7 - halo : 8 + halo, 7 - halo : 8 + halo]
        side = 4 * part.shape[-1]
        middle = model.decode(part, (side, side)).mean[..., 4 * halo : 4 * halo + 4, 4 * halo : 4 * halo + 4]
        assert torch.allclose(middle, whole, atol=1e-6) == (halo == decoding)
    image = torch.rand(1, 3, 60, 60)
    mean = model.encode(image).mean[..., 7, 7]
    for halo in (encoding, encoding - 1):
        part = image[..., 28 - 4 * halo : 32 + 4 * halo, 28 - 4 * halo : 32 + 4 * halo]
        assert torch.allclose(model.encode(part).mean[..., halo, halo], mean, atol=1e-6) == (halo == encoding)


def test_flow_matching_on_a_large_grid_equals_all_at_once(monkeypatch):
    torch.manual_seed(0)
    prior = FlowMatching((2, 8, 8), hidden=8, dilations=(1, 1), steps=3)
    for layer in (prior.last, *(block.mix for block in prior.blocks)):  # which start at zero: it would see one position
        torch.nn.init.normal_(layer.weight, std=0.5)
    whole = prior.sample(2, (23, 30), seed=1)
    from vaenb import flows

    tiled = flows.tiled
    monkeypatch.setattr(flows, "tiled", lambda function, x, halo, _: tiled(function, x, halo, 7))
    torch.testing.assert_close(prior.sample(2, (23, 30), seed=1), whole, atol=1e-5, rtol=0)
    monkeypatch.setattr(flows, "tiled", lambda function, x, halo, _: tiled(function, x, halo - 1, 7))
    assert not torch.allclose(prior.sample(2, (23, 30), seed=1), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (lambda: VAE("mixed", (3, 32, 32)), GlobalLayerError),
        (lambda: VAE("dense", (3, 32, 32)), GlobalLayerError),
        (lambda: VAE("spatial", (3, 32, 32), coordinates=True), GlobalLayerError),
        (lambda: VAE("spatial", (3, 32, 32), padding="circular"), ValueError),
    ],
)
def test_models_that_cannot_be_cut_into_tiles(model, error):
    with pytest.raises(error, match=r"spatial arm|opposite borders"):
        canvas.halos(model())


def test_an_image_smaller_than_the_stride():
    with pytest.raises(ImageSizeError, match="smaller than the stride"):
        next(canvas.reconstruct(model_of(), torch.zeros(3, 3, 50, dtype=torch.uint8)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_of_large_tiles_is_used_again():
    """Page faults of the last of a few tensors of 64 MB, one after the other: none if its memory is that of one before."""
    code = """if True:
        import resource, sys, torch
        from vaenb import canvas, cpu  # as many small blocks as a program has
        if sys.argv[1] == "kept":
            cpu.keep_memory()
        before = 0
        for _ in range(8):
            torch.ones(2**24)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            last, before = faults - before, faults
        print(last)"""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, what], check=True, stdout=subprocess.PIPE, text=True).stdout)
        for what in ("kept", "given back")
    )
    assert kept < given_back / 10
