"""The step log: its format, its writer, and what it says."""
