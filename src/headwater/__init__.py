"""Headwater follows a model's prediction upstream."""
