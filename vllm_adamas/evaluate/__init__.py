"""Evaluation of sparse decode against dense attention, and calibration of a model."""
