"""The backends that come with repurpose-opt, one file each; found by entry point, never imported by the core."""
