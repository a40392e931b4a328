"""What training needs around the model: stages, trainer, checkpoints, curves."""
