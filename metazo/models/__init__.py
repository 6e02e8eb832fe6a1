"""Load a model, put adapters on it, and choose the tensors to train."""
