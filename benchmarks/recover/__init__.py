"""Accuracy of pruned and merged networks after some epochs of fine-tuning, by method."""
