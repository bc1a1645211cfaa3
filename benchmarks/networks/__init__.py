"""The networks that the benchmarks measure, their data sets and the recipes that train them."""
