"""Caches of crops, latents and text tokens: plan, format, writing, reading."""
