"""Train latent diffusion image models from scratch and compare them fairly."""

__version__ = "0.1.0"
