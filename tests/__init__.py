"""Tests of the course. A package, so that test modules may import helpers from it."""
