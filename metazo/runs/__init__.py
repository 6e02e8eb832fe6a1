"""A fine-tuning run: settings, set-up, the loop, its folder, and its replay."""
