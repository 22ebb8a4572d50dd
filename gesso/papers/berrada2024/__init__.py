"""Tables and figures of Berrada et al. 2024."""
