"""Checkpoints: Hugging Face folders in and out, and the run's own resumable state."""
