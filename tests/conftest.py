"""What keeps the tests fast."""

import gc

import tokcc.report.measure

# Traces are many small objects that live long: looking through them all again and again takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)

# No test reads a time off a measurement: the fewest rounds do.
tokcc.report.measure.TIMED_SECONDS = 0.0
