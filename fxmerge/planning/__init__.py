"""The decisions of a merge: how many channels each group keeps, which ones, and what replaces the others."""
