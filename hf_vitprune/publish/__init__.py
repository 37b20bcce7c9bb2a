"""Cards, the Hub, and tables of what was pruned."""
