"""The demo: six sensors see the same digit, and a network split over six processes names it."""
