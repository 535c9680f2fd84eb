"""Results: how attributions are read, summed, shown and kept."""
