"""Accuracy after merging without fine-tuning."""
