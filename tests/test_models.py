import itertools

import pytest
import torch
from torch.distributions import kl_divergence

from vaenb.models import (
    ARMS,
    BATCH,
    VAE,
    AcrossPositions,
    Conv2d,
    ImageSizeError,
    Residual,
    SubpixelUp,
    ToMap,
    ToVector,
    evaluate,
    noise_sources,
    reparametrise,
)

STRIDE_OF = {7: 4, 14: 2, 28: 1}


def model(arm="spatial", size=7, **extra):
    torch.manual_seed(0)
    return VAE(arm, (1, 28, 28), STRIDE_OF[size], **extra)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("channels", [1, 3])
def test_arms_share_trunks_and_latent_count(arm, size, channels):
    vae = model(arm, size, latent_channels=channels)
    reference = model("spatial", size)
    for part in ("encoder", "decoder"):
        shapes = [[p.shape for p in getattr(m, part).parameters()] for m in (vae, reference)]
        assert shapes[0] == shapes[1]
    q = vae.encode(torch.rand(5, 1, 28, 28))
    assert q.event_shape.numel() == channels * size * size
    assert vae.decode(q.sample()).sample().shape == (5, 1, 28, 28)
    assert vae.prior().event_shape == q.event_shape


def test_28x28_map():
    assert model(size=28).encode(torch.rand(1, 1, 28, 28)).event_shape == (1, 28, 28)


@pytest.mark.parametrize("arm", ARMS)
def test_every_parameter_gets_a_gradient(arm):
    vae = model(arm)
    rate, distortion = vae(torch.rand(4, 1, 28, 28).round(), torch.randn(4, *vae.latent_shape))
    (rate + distortion).mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [((3, 5), 1, (1, 2)), (4, 2, 1)])
def test_circular_padding_is_that_of_pytorch_and_leaves_channels_last(kernel_size, stride, padding):
    torch.manual_seed(0)
    layers = (Conv2d, torch.nn.Conv2d)
    ours, theirs = (layer(6, 4, kernel_size, stride, padding, padding_mode="circular") for layer in layers)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 8, 6).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


def test_subpixel_up_is_a_transposed_convolution():
    torch.manual_seed(0)
    up, transposed = SubpixelUp(3, 2), torch.nn.ConvTranspose2d(3, 2, kernel_size=4, stride=2, padding=1)
    with torch.no_grad():
        for channel, a, b in itertools.product(range(2), range(2), range(2)):
            phase = (2 * a + b) * 2 + channel
            # shuffled row 2p + a becomes output row y = 2p + a - 1 and sees inputs p - 1, p: taps y + 1 - 2·input
            rows, columns = ([a + 2, a] for a in (a, b))
            weight = transposed.weight[:, channel][:, rows][:, :, columns]
            up.phases.weight[phase] = weight
            up.phases.bias[phase] = transposed.bias[channel]
    x = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(up(x), transposed(x), atol=1e-5, rtol=1e-5)


def test_subpixel_up_has_the_phase_before_the_channel():
    torch.manual_seed(0)
    up, x = SubpixelUp(3, 2), torch.randn(2, 3, 5, 7)
    phases = up.phases(x).unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(up(x), torch.nn.functional.pixel_shuffle(phases, 2)[..., 1:-1, 1:-1], rtol=0, atol=0)


def test_a_map_and_its_vector_are_the_same_memory_where_channels_come_last():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    vector = ToVector()(x)
    assert vector.shape == (2, 60)
    assert torch.equal(ToMap(3, 4, 5)(vector), x)
    assert vector.data_ptr() == x.data_ptr() == ToMap(3, 4, 5)(vector).data_ptr()
    assert torch.equal(vector[:, 3:6], x[:, :, 0, 1])  # the channels of the second position


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_subpixel_up_are_those_of_differences(memory_format):
    torch.manual_seed(0)
    up = SubpixelUp(2, 3).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.double).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(up, x)
    assert torch.autograd.gradgradcheck(up, x)


@pytest.mark.parametrize("arm", ARMS)
def test_new_blocks_change_nothing_and_learn(arm):
    vae = model(arm, blocks=2)
    assert [sum(isinstance(m, Residual) for m in part) for part in (vae.encoder, vae.decoder)] == [2, 2]
    x = torch.randn(2, 32, 7, 7)
    block = vae.decoder[0]
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)
    for _ in range(2):  # the layers before the one that begins at zero get a gradient at the second step
        rate, distortion = vae(torch.rand(4, 1, 28, 28).round(), torch.randn(4, *vae.latent_shape))
        vae.zero_grad()
        (rate + distortion).mean().backward()
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter -= 1e-4 * parameter.grad
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.parameters())
    assert not torch.equal(block(x), x)


def test_p_of_x_given_z_sums_to_one_over_all_images():
    torch.manual_seed(0)
    vae = VAE("dense", (1, 3, 3), stride=1, latents=2)
    everything = torch.tensor(list(itertools.product([0.0, 1.0], repeat=9))).view(-1, 1, 3, 3)
    z = torch.randn(1, 2).expand(len(everything), -1)
    assert vae.decode(z).log_prob(everything).logsumexp(0).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_rate_is_the_divergence_and_distortion_the_log_density(arm):
    vae = model(arm)
    x, noise = torch.rand(6, 1, 28, 28).round(), torch.randn(6, *vae.latent_shape)
    rate, distortion = vae(x, noise)
    mean, scale = vae.encode(x).mean.flatten(1), vae.encode(x).stddev.flatten(1)
    torch.testing.assert_close(rate, 0.5 * (mean**2 + scale**2 - 1 - 2 * scale.log()).sum(1), atol=1e-3, rtol=1e-4)
    p = vae.decode(reparametrise(vae.encode(x), noise)).mean.double()
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    torch.testing.assert_close(distortion.double(), expected, atol=1e-2, rtol=1e-4)
    draws = vae.encode(x).sample((4000,))
    estimate = (vae.encode(x).log_prob(draws) - vae.prior().log_prob(draws)).mean(0)
    torch.testing.assert_close(rate, estimate, atol=0.5, rtol=0.1)
    torch.testing.assert_close(rate, kl_divergence(vae.encode(x), vae.prior().expand((6,))))


@pytest.mark.parametrize("size", [7, 14, 28])
def test_spatial_is_translation_equivariant_away_from_the_border(size):
    vae, stride = model(size=size), STRIDE_OF[size]
    x = torch.zeros(1, 1, 64, 64)
    x[..., 24:40, 24:40] = torch.rand(16, 16)
    moved = x.roll((4 * stride, 2 * stride), (2, 3))
    cut = slice(4, -6)
    encoded, shifted = vae.encode(x).mean, vae.encode(moved).mean
    torch.testing.assert_close(shifted.roll((-4, -2), (2, 3))[..., cut, cut], encoded[..., cut, cut], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [7, 14, 28])
def test_a_latent_reaches_its_neighbourhood_only_unless_a_layer_crosses_positions(size):
    z = torch.randn(1, 1, size, size)
    poked = z.clone()
    poked[..., 0, 0] += 1
    vae = model(size=size)
    changed = (vae.decode(z).mean != vae.decode(poked).mean)[0, 0]
    assert changed[0, 0]
    assert not changed[14:].any()  # bit for bit
    assert not changed[:, 14:].any()
    if size < 28:
        mixed = model("mixed", size)
        assert (mixed.decode(z).mean != mixed.decode(poked).mean)[0, 0, 14:, 14:].any()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (29, 31), (5, 64), (4, 4), (101, 30)])
def test_any_size_is_padded_and_cropped_back(height, width):
    vae = model()
    x = torch.rand(2, 1, height, width).round()
    q = vae.encode(x)
    assert q.event_shape == (1, -(-height // 4), -(-width // 4)) == vae.prior((height, width)).event_shape
    assert vae.decode(q.mean, (height, width)).mean.shape == x.shape
    rate, distortion = vae(x, torch.randn_like(q.mean))
    assert torch.isfinite(rate + distortion).all()


def test_padding_repeats_the_edge():
    vae = model()
    x = torch.rand(1, 1, 30, 29)
    by_hand = torch.nn.functional.pad(x, (0, 3, 0, 2), mode="replicate")
    torch.testing.assert_close(vae.encode(x).mean, vae.encode(by_hand).mean)


@pytest.mark.parametrize("arm", ["dense", "mixed"])
def test_global_layers_can_be_made_for_any_one_size(arm):
    vae = VAE(arm, (3, 30, 45), stride=4)
    x = torch.rand(2, 3, 30, 45)
    assert vae.decode(vae.encode(x).mean).mean.shape == x.shape
    with pytest.raises(ImageSizeError, match="use the spatial arm"):
        vae.encode(torch.rand(2, 3, 64, 64))


def test_clear_errors():
    with pytest.raises(ValueError, match="unknown arm 'fc': choose one of spatial, dense, mixed"):
        VAE("fc")
    with pytest.raises(ValueError, match="unknown stride 3"):
        VAE(stride=3)
    with pytest.raises(ValueError, match="dense arm"):
        VAE("spatial", latents=20)
    with pytest.raises(ImageSizeError, match="3×28 pixels is smaller than the stride of 4"):
        model().encode(torch.rand(1, 1, 3, 28))
    with pytest.raises(ImageSizeError):
        VAE(image_shape=(1, 2, 2))
    with pytest.raises(ValueError, match="expected \\(N, 1, 7, 7\\)"):
        model().decode(torch.randn(4, 49))
    with pytest.raises(ValueError, match="expected \\(N, 20\\)"):
        model("dense", latents=20).decode(torch.randn(4, 21))


def test_evaluation_repeats_with_its_seed():
    vae = model().eval()
    images = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8)
    whole = sum(evaluate(vae, images))
    again = sum(evaluate(vae, images))
    assert torch.equal(whole, again)
    assert not torch.equal(whole, sum(evaluate(vae, images, seed=1)))
    assert whole.shape == (50,)


VARIANTS = [
    {"kernel_size": 13},
    {"coordinates": True},
    {"padding": "circular"},
    {"kernel_size": 5, "padding": "circular", "coordinates": True},
    {"arm": "mixed", "reach": 1},
    {"arm": "mixed", "reach": 0, "coordinates": True},
    {"arm": "mixed", "sides": "decoder"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_share_trunks_and_train(options):
    vae, reference = VAE(**options), VAE()
    for part in ("encoder", "decoder"):
        shapes = [[p.shape for p in getattr(m, part).parameters()] for m in (vae, reference)]
        assert shapes[0] == shapes[1]
    rate, distortion = vae(torch.rand(4, 1, 28, 28).round(), torch.randn(4, *vae.latent_shape))
    (rate + distortion).mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.parameters())


def test_a_reach_as_long_as_the_map_is_a_global_layer():
    limited, whole = VAE("mixed", reach=6), VAE("mixed")
    limited.load_state_dict(whole.state_dict())
    z = torch.randn(2, 1, 7, 7)
    torch.testing.assert_close(limited.decode(z).mean, whole.decode(z).mean, rtol=0, atol=0)


@pytest.mark.parametrize("reach", [0, 2])
def test_a_layer_with_a_reach_starts_as_the_model_without_it(reach):
    plain, limited = VAE(), VAE("mixed", reach=reach)
    shared = {name.replace("from_latent.0", "from_latent.1"): tensor for name, tensor in plain.state_dict().items()}
    missing, unknown = limited.load_state_dict(shared, strict=False)
    assert sorted(missing) == [
        f"{way}_latent.{i}.{what}" for way, i in (("from", 0), ("to", 1)) for what in ("bias", "weight")
    ]
    assert not unknown
    x, z = torch.rand(3, 1, 28, 28), torch.randn(3, 1, 7, 7)
    torch.testing.assert_close(limited.encode(x).mean, plain.encode(x).mean)
    torch.testing.assert_close(limited.decode(z).mean, plain.decode(z).mean)


@pytest.mark.parametrize(("sides", "layers"), [("both", (1, 1)), ("encoder", (1, 0)), ("decoder", (0, 1))])
def test_layers_across_positions_are_on_the_sides_asked_for(sides, layers):
    vae = VAE("mixed", sides=sides)
    found = [sum(isinstance(layer, AcrossPositions) for layer in part) for part in (vae.to_latent, vae.from_latent)]
    assert tuple(found) == layers


def test_spatial_variants_take_images_of_any_size():
    for options in ({"coordinates": True}, {"padding": "circular"}, {"kernel_size": 5}, {"blocks": 1}):
        vae = VAE(**options)
        x = torch.rand(1, 1, 36, 44)
        assert vae.decode(vae.encode(x).mean).mean.shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "odd"),
        ({"padding": "reflect"}, "choose one of zeros, circular"),
        ({"arm": "dense", "coordinates": True}, "the dense arm has none"),
        ({"arm": "dense", "kernel_size": 5}, "the dense arm has none"),
        ({"reach": 2}, "only the mixed arm"),
        ({"sides": "decoder"}, "only the mixed arm"),
        ({"arm": "mixed", "sides": "left"}, "choose one of both, encoder, decoder"),
        ({"blocks": -1}, "at least 0"),
    ],
)
def test_variants_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        VAE(**options)


def test_pixels_and_latents_have_random_numbers_of_their_own():
    first = [torch.rand(4, generator=source).tolist() for seed in range(3) for source in noise_sources(seed)]
    assert len({tuple(numbers) for numbers in first}) == 6


def test_evaluation_draws_anew_for_every_batch():
    torch.manual_seed(0)
    image = torch.randint(2, (1, 1, 28, 28), dtype=torch.uint8) * 255  # binarisation changes nothing
    distortion = evaluate(VAE().eval(), image.expand(2 * BATCH, -1, -1, -1))[1]
    assert len(distortion.unique()) > 1.9 * BATCH


def test_images_are_cropped_from_the_top_left():
    torch.manual_seed(0)
    vae, z = VAE(), torch.randn(1, 1, 7, 7)
    torch.testing.assert_close(vae.decode(z, (26, 27)).mean, vae.decode(z).mean[..., :26, :27])
