"""The benchmarks of Farshore. Above every floor; only ``farshore bench`` imports them."""
