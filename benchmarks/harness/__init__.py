"""What several benchmarks share: rows in files, one process for each row, pages and plots."""
