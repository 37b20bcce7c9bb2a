"""Latency: measured, kept in a table, predicted."""
