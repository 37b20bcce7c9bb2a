"""Structured pruning of Hugging Face vision transformers."""
