"""The shape of a model, and nothing of its weights."""
