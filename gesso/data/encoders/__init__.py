"""Encoders of images and text, and the face detector."""
