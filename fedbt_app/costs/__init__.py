"""Costs: measured, booked, and predicted."""
