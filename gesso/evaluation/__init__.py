"""Numbers for images: feature networks, metrics, and the protocol that each number carries."""
