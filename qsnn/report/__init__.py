"""Records, and what people look at."""
