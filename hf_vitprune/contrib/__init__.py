"""What stands beside the engine: SPViT checkpoints, BatchNorm folded away, storage, 2:4 sparsity, retraining."""
