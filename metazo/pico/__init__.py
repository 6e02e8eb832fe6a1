"""The embedded default: a small language model (`model/`) and its generated tasks (`grammar`)."""
