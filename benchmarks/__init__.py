"""Measurements of this library: speed, and accuracy on VTAB-1k."""
