"""What Farshore's speed is measured with. Above every floor; only ``farshore bench`` imports it."""
