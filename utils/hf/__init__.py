"""Other people's formats, in and out: config.json, safetensors, GGUF, PEFT, chat templates; and where files come from."""
