"""Hugging Face checkpoints to and from Core's shards."""
