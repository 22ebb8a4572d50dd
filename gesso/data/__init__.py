"""Images on disk to batches of x0 and conditions."""
