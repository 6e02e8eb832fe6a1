"""Published tuners that ship with metazo: index.json and `<base model>/<version>/{tuner.safetensors,card.md}`."""
