"""Estimators: Shapley values of any game from the values of some of its coalitions."""
