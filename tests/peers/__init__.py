"""The course's port against torch, transformers and peft themselves (`make test-peers`)."""
