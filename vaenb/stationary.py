"""A prior for pictures of land, on maps of any size: flow matching from noise that already correlates as the latents do.

A tile of land has a colour: most of what varies between tiles is the same all over a tile. A convolutional network that
starts from white noise must find that out by consensus, and does not; in pictures of diffusion models the same is known as
the want of *offset noise*. So the noise is a sum of fields of several scales, fitted to the latents.
"""

from collections.abc import Sequence

from vaenb.flows import FlowMatching


class StationaryFlow(FlowMatching):
    """``flows.FlowMatching`` with blocks that see as far as the middle of a tile does.

    Args:
        shape: of the latents.
        dilations, steps, options: see ``flows.FlowMatching``.
    """

    def __init__(self, shape: Sequence[int], dilations: Sequence[int] = (1, 2, 4, 1), steps: int = 8, **options: float):
        super().__init__(shape, dilations=dilations, steps=steps, **options)
