"""Networks that were trained elsewhere, with real data."""
