"""Which code is it? References, pins, checkouts, and the sources and store behind them."""
