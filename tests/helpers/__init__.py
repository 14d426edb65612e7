"""What several test files share; no test among it."""
