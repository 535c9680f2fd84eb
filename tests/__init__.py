"""The tests mirror the package; a package themselves, so that no other library that ships a `tests` comes first."""
