"""The outer steps, one class a file. What can be said of them without loading them is in
`core_training.parts.outer_steps`."""
