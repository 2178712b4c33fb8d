"""Training with a recipe, or with a Trainer of your own."""
