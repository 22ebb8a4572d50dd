"""Feature networks: Inception, LPIPS, CLIP, DINOv2 and the small classifiers that ship with gesso."""
