"""Why can't one sample from a fully convolutional VAE? Models, training and measurements of the paper.

The notebooks are the paper; this package holds what they call. Importing it is cheap: PyTorch is loaded by the
modules that need it.
"""

__version__ = "0.1.0"
