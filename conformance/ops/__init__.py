"""Laws and comparisons, one file a family of ops."""
