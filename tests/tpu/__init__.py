"""What only the TPU's own compiler can say (`make test-tpu`)."""
