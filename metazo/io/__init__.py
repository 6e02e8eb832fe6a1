"""Files, append-only lines, untrusted JSON and YAML, tensor files, and what is kept out of messages."""
