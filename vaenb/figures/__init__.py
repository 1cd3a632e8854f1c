"""Every plot of the paper, in one style; each is saved as a PNG with its plotted numbers in a JSON file beside it.

Functions take results (arrays, lists of numbers) and know nothing of models.
"""

from vaenb.figures.bugs import loss_scaling, quantiles
from vaenb.figures.charts import Curve, Matrix, curves, matrices
from vaenb.figures.controls import linear_model, textures
from vaenb.figures.land import land
from vaenb.figures.maps import dependence_fields, latent_maps, map_sizes, reshaped_latents
from vaenb.figures.repair import neighbours, worth
from vaenb.figures.strips import rows, strips
from vaenb.figures.style import (
    ARM_COLOURS,
    ARM_TITLES,
    PALETTE,
    colour,
    encode,
    grey,
    mosaic,
    new,
    pictures,
    read_numbers,
    save,
    show_ink,
    signed,
    styled,
)
from vaenb.figures.symptom import gallery, seed_points

__all__ = [
    "ARM_COLOURS",
    "ARM_TITLES",
    "PALETTE",
    "Curve",
    "Matrix",
    "colour",
    "curves",
    "dependence_fields",
    "encode",
    "gallery",
    "grey",
    "land",
    "latent_maps",
    "linear_model",
    "loss_scaling",
    "map_sizes",
    "matrices",
    "mosaic",
    "neighbours",
    "new",
    "pictures",
    "quantiles",
    "read_numbers",
    "reshaped_latents",
    "rows",
    "save",
    "seed_points",
    "show_ink",
    "signed",
    "strips",
    "styled",
    "textures",
    "worth",
]
