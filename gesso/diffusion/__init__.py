"""Process, denoiser, guidance and samplers: everything between noise and image."""
