"""Tables and figures of EDM2 (Karras et al. 2024)."""
