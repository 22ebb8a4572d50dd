"""gesso: latent diffusion image models from scratch, on even ground."""

__version__ = "0.1.0"
