"""Experiments that are in neither paper."""
