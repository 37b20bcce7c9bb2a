"""Plans: which units stay, by index, and the architecture that follows."""
