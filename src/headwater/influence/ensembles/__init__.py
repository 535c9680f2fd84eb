"""Ensembles: one method over several models, with a standard error from how much they differ."""
