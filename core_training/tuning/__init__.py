"""Which parameters are trained. A tuning mode is one file here and one line in `core_training.parts.tuning_modes`.

The file has `apply(model, recipe)`: it takes a transformers model whose weights are all there, unquantised, and returns
it with `requires_grad` set on exactly what is trained. It raises InputError where the recipe does not fit the model.
"""
