"""The course's port against the originals: torch, transformers and peft, live (`make test-parity`)."""
