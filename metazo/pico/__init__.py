"""The embedded default model: a small language model (`model/`) and its generated tasks (`grammar`)."""
