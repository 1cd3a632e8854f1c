import math

import numpy as np
import pytest
import torch

from vaenb import scenes
from vaenb.samples import two_point_correlation


def test_white_noise_has_a_flat_spectrum_and_no_correlation():
    noise = torch.randn(4000, 32, 32, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(scenes.spectrum(noise), 1, atol=0.05)
    correlation = two_point_correlation(noise)
    assert correlation[0] == pytest.approx(1)
    assert max(map(abs, correlation[1:])) < 0.02


def test_a_wave_has_its_power_at_its_frequency():
    x = torch.arange(64) / 64
    phase = torch.arange(8)[:, None] * math.pi / 4
    waves = torch.sin(2 * math.pi * 5 * x + phase)[:, None, :].expand(-1, 64, -1)
    power = scenes.spectrum(waves)
    assert power.argmax() + 1 == 5
    assert power[[3, 4, 5]].sum() / power.sum() > 0.99  # a Hann window spreads it to the neighbours


def test_smoothing_by_a_known_kernel_correlates_as_it_must():
    noise = torch.randn(500, 40, 40, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.avg_pool2d(noise[:, None], 4, stride=1)[:, 0]
    expected = [max(1 - r / 4, 0) for r in range(len(two_point_correlation(smooth)))]
    np.testing.assert_allclose(two_point_correlation(smooth), expected, atol=0.03)


def test_relative_error_of_curves():
    assert scenes.relative_error([1, 0.5, 0.2], [1, 0.5, 0.2]) == 0
    assert scenes.relative_error([1, 0.0, 0.0], [1, 0.5, 0.2]) == pytest.approx(1)


def test_a_spectrum_does_not_take_borders_for_edges():
    wave = torch.sin(2 * math.pi * 5.5 * torch.arange(64) / 64)[None, None].expand(1, 64, 64)
    power = scenes.spectrum(wave)
    assert power[12:].sum() / power.sum() < 1e-4


def test_brightness_changes_no_statistic_of_a_field():
    noise = torch.rand(50, 3, 24, 24, generator=torch.Generator().manual_seed(0)) / 2
    dark, bright = (scenes.stationary({"data": noise + offset}) for offset in (0.0, 0.4))
    for name in ("two_point", "spectrum", "variance"):
        np.testing.assert_allclose(bright[name]["data"], dark[name]["data"], rtol=1e-2, atol=1e-3)
