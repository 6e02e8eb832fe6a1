"""Files, append-only lines, untrusted JSON and YAML, tensor files, and the removal of secrets from messages."""
