"""The course's port against the reference implementations: torch, transformers and peft, live (`make test-peers`)."""
