"""What keeps the tests fast."""

import gc

# Traces are many small objects that live long: looking through them all again and again takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)
