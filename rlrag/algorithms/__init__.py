"""Estimators and losses as pure tensor mathematics: no files, no Ray, no models."""
