"""Seeded task generators, one file a task."""
