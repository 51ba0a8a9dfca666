"""Making a model: recipes, data, the training loop over Accelerate. Start with `python -m train CONFIG`."""
