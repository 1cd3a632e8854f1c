import numpy as np
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from vaenb.models import VAE
from vaenb.receptive import (
    DependentPriorError,
    GlobalLayerError,
    dependence_range,
    independent_share,
    receptive_field,
    require_independent,
    share_a_latent,
)

LOCAL = [
    {"stride": 4},
    {"stride": 2},
    {"stride": 1},
    {"stride": 4, "kernel_size": 1},
    {"stride": 4, "kernel_size": 5, "padding": "circular"},
    {"stride": 2, "padding": "circular"},
    {"stride": 4, "coordinates": True},
    {"stride": 2, "blocks": 2},
    {"stride": 1, "blocks": 1, "padding": "circular"},
    {"arm": "mixed", "stride": 4, "reach": 1},
    {"arm": "mixed", "stride": 4, "sides": "encoder"},
]


def local_model(options, image=(1, 16, 20)):
    torch.manual_seed(0)
    vae = VAE(**{"arm": "spatial", "image_shape": image, **options}).double().requires_grad_(False)
    for parameter in vae.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # no weight is zero, as those of new residual blocks are
    return vae


@pytest.mark.parametrize("options", LOCAL, ids=str)
def test_field_is_where_the_jacobian_is_not_zero(options):
    vae = local_model(options)
    rows, columns = receptive_field(vae)
    z = torch.randn(1, *vae.latent_shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda latent: vae.decode(latent).base_dist.logits[0, 0], z)
    seen = jacobian[:, :, 0, 0].ne(0).numpy()  # (H, W, h, w)
    np.testing.assert_array_equal(seen, rows[:, None, :, None] & columns[None, :, None, :])


@pytest.mark.parametrize("options", LOCAL, ids=str)
def test_pixels_outside_the_field_of_a_latent_do_not_change_by_one_bit(options):
    vae = local_model(options)
    rows, columns = receptive_field(vae)
    z = torch.randn(1, *vae.latent_shape, dtype=torch.float64)
    before = vae.decode(z).mean
    for i, j in [(0, 0), (1, 2), (rows.shape[1] - 1, 1)]:
        other = z.clone()
        other[0, :, i, j] += 3
        changed = (vae.decode(other).mean != before)[0, 0].numpy()
        assert not changed[~np.outer(rows[:, i], columns[:, j])].any()
        assert changed.any()


def test_regions_beyond_the_range_are_independent_and_those_within_are_not():
    """Fix the latents that region A sees and draw the others anew: A does not move, whatever B does."""
    vae = local_model({"stride": 4}, image=(1, 28, 28))
    rows, _ = receptive_field(vae)
    top, bottom = rows[:4].any(0), rows[-4:].any(0)
    assert not (top & bottom).any()
    z, anew = torch.randn(2, 1, *vae.latent_shape, dtype=torch.float64)
    mixed = torch.where(torch.from_numpy(top)[:, None], z, anew)
    np.testing.assert_array_equal(vae.decode(mixed).mean[..., :4, :], vae.decode(z).mean[..., :4, :])
    np.testing.assert_array_equal(vae.decode(mixed).mean[..., -4:, :], vae.decode(anew).mean[..., -4:, :])
    assert (vae.decode(mixed).mean[..., 12:16, :] != vae.decode(z).mean[..., 12:16, :]).any()


@pytest.mark.parametrize(("stride", "share"), [(4, 0.34), (2, 0.71), (1, 0.83)])
def test_share_of_independent_pairs_is_what_counting_pairs_gives(stride, share):
    vae = VAE(stride=stride)
    rows, columns = receptive_field(vae)
    fields = [set(zip(*np.nonzero(np.outer(row, column)), strict=True)) for row in rows for column in columns]
    pairs = [(a, b) for a in range(0, 784, 13) for b in range(784) if a != b]  # a sample: all of them take long
    meet = share_a_latent(rows, columns)
    assert all(meet[a, b] == bool(fields[a] & fields[b]) for a, b in pairs)
    assert independent_share(vae) == pytest.approx(share, abs=0.005)
    far = dependence_range(rows, columns)
    distance = np.abs(np.subtract.outer(np.arange(28), np.arange(28)))
    assert (rows.astype(int) @ rows.T.astype(int))[distance > far].sum() == 0


def test_a_torus_is_shift_equivariant_and_zero_padding_is_not():
    """T2: shifting the map by a position shifts the image by the stride."""
    for padding, equivariant in (("circular", True), ("zeros", False)):
        vae = local_model({"stride": 4, "padding": padding, "blocks": 1})
        z = torch.randn(2, *vae.latent_shape, dtype=torch.float64)
        image, shifted = vae.decode(z).base_dist.logits, vae.decode(z.roll((1, -2), (2, 3))).base_dist.logits
        assert torch.allclose(image.roll((4, -8), (2, 3)), shifted, atol=1e-12) == equivariant
        encoded, moved = vae.encode(image).mean, vae.encode(image.roll((4, -8), (2, 3))).mean
        assert torch.allclose(encoded.roll((1, -2), (2, 3)), moved, atol=1e-12) == equivariant


def test_coordinates_break_the_equivariance_of_a_torus():
    vae = local_model({"stride": 4, "padding": "circular", "coordinates": True})
    z = torch.randn(1, *vae.latent_shape, dtype=torch.float64)
    assert not torch.allclose(vae.decode(z).mean.roll(4, 2), vae.decode(z.roll(1, 2)).mean)


@pytest.mark.parametrize("arm", ["dense", "mixed"])
def test_global_layers_have_no_receptive_field(arm):
    with pytest.raises(GlobalLayerError, match="every pixel sees every latent"):
        receptive_field(VAE(arm))


def test_t1_needs_an_independent_prior():
    vae = VAE()
    require_independent(vae.prior())
    for prior in (
        MultivariateNormal(torch.zeros(49), torch.eye(49)),
        Independent(MultivariateNormal(torch.zeros(1, 7, 7), torch.eye(7)), 2),
        Normal(torch.zeros(1, 7, 7), torch.ones(1, 7, 7)),
    ):
        with pytest.raises(DependentPriorError, match="independent between the positions"):
            independent_share(vae, prior)


def test_normalisation_over_space_has_no_receptive_field():
    vae = VAE()
    vae.decoder.insert(1, torch.nn.GroupNorm(1, 32))
    with pytest.raises(GlobalLayerError, match="GroupNorm"):
        receptive_field(vae)


def test_counting_pairs_needs_no_list_of_them():
    vae = VAE()
    rows, columns = receptive_field(vae, (28, 36))
    pairs = share_a_latent(rows, columns)
    off = ~np.eye(len(pairs), dtype=bool)
    assert independent_share(vae, size=(28, 36)) == pytest.approx((~pairs)[off].mean())
    assert independent_share(vae, size=(2048, 2048)) > 0.999
    wide = np.ones((3, 512), dtype=bool)  # 512 common positions are many, not none
    assert share_a_latent(wide, wide).all()
    assert dependence_range(wide, wide) == 2


def test_the_range_of_dependence_is_that_of_the_axis_that_reaches_farther():
    from vaenb.receptive import dependence_range

    near, far = np.eye(4, dtype=bool), np.ones((3, 5), dtype=bool)
    assert dependence_range(near, far) == dependence_range(far, near) == 2
