"""The step log: its format, its writer, and its inspection."""
