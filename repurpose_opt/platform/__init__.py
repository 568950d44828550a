"""What a plan would cost on a platform: a model of workers and links, its timeline, and traces for ASTRA-sim."""
