"""Scoring of models."""
