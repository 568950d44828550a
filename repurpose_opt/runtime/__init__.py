"""A plan on disk, and the P processes that run it and exchange only the values that are needed."""
