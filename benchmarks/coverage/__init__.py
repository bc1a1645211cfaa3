"""Which of the models that people use fxmerge can merge, and a recording of what it computes for some of them."""
