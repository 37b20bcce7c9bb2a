"""Cuts, masks and gates on one plain model."""
