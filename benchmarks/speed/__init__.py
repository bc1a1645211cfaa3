"""How long merging takes, and how fast merged models run."""
