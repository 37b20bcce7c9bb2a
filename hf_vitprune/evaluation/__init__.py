"""What a model is worth: metrics, pipelines measured, and results kept in files."""
