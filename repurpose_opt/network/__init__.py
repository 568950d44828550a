"""Whole networks: tracing, calibration, one price for all layers, fine-tuning."""
