"""Quality that a user can check: evaluation against dense attention, and calibration of a model."""
