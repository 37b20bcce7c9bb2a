"""Losses of the task and of teachers."""
