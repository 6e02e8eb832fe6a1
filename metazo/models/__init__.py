"""Load a model, put adapters on it, and choose what is trained."""
