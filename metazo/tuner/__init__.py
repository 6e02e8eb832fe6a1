"""A tuner: its file, its networks, whether it fits a model, and the block scale it gives."""
