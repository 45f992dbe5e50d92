"""How long isohub takes, beside what one would use instead: ``python -m benchmarks``.

Contestants take turns within each round, one at a time, so that whatever else the machine does meets all of
them; ratios are taken within a round. Figures are for people: nothing here passes or fails by a time.
"""
