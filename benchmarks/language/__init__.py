"""Language models against the published post-training pruners, on the same tokens."""
